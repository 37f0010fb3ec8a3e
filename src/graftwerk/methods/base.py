"""The contract that every method keeps, and nothing about how it gets into a model.

    x' = pre_forward(x),   y = module(x'),   y' = post_forward(x', y)          what an adapted module computes
    merged_weight(W, bias) = W', bias'                                         the same as another weight

A method (`Method`) is a frozen settings object, such as `LoRA(r=8)`, that knows three things: which modules of a model
it targets (`select_targets`, by role, never by an architecture's names), how many parameters that costs
(`num_parameters`, a formula), and the adapter module of each target (`build`).

The adapter module of a target inside a layer is an `AdapterModule`; attention (`prefix_tuning.py`) and the input
embedding (`prompt_tuning.py`, `ptuning.py`) have modules of their own.

Legend used throughout: B rows, T tokens, H heads, G key/value heads, D head width, d model width, r rank, n virtual
tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.settings import Settings
from graftwerk.settings_parsing import parse_settings


class Role(StrEnum):
    """Roles of modules, whatever an architecture calls them."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    FUSED_QKV = "fused_qkv"
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_GATE = "ffn_gate"
    FFN_OUT = "ffn_out"
    OTHER_LINEAR = "other_linear"
    EMBEDDING = "embedding"
    """A table of vectors, one for each token: single rows of it are adapted."""
    VOCABULARY = "vocabulary"
    """A linear layer that scores the vocabulary, as a table with a row for each token; as a layer it is a `HEAD`."""
    NORM = "norm"
    HEAD = "head"
    """A linear layer outside the base model (`lm_head`, `classifier`): adapted only if a target names it."""
    LOOSE_BIAS = "loose_bias"
    """A bias that is not added to the features of a layer's output (of a convolution, of attention scores): listed so
    that a method can say that it leaves it out."""
    PARAMETER = "parameter"
    """A parameter by itself, such as the weights of all experts of a layer: adapted only if it is named."""


ATTENTION_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.FUSED_QKV, Role.ATTENTION_OUT})


@dataclass(frozen=True)
class TargetModule:
    """One module of a model that an adapter module can be built for, or one parameter.

    Attributes:
        path: Its dotted path in the model, as in `named_modules()`; for a parameter as in `named_parameters()`.
        role: Its role in the architecture.
        in_features, out_features: Its widths; equal for a norm.
        has_bias: True if it has a bias vector.
        ffn: Identifies the feed-forward block that it belongs to (the same text for its first and its last layer), or
            None outside of those.
        layer: Index of its layer within its stack, or None outside the layers.
        stack: Its stack of layers: ``encoder``, ``decoder`` or ``causal``; in a model whose architecture is not known
            the path of the list of layers.
        weight_only: True if its parent reads its weight and bias and never calls it. An adapter there changes the
            weight that is read, and cannot differ by row; such a layer is left out unless it is named.
        unfit: The reason why no adapter works in this layer (it returns a tuple, ...), or None if one does. Such a
            layer is left out, and naming it raises with this reason.
        is_input: True for the embedding that the model reads its tokens with.
        tied_to: Path of the table whose weight it is, or None if it has one of its own.
        experts: Number of matrices (out, in) that a parameter holds; 1 for a module.
    """

    path: str
    role: Role
    in_features: int
    out_features: int
    has_bias: bool
    ffn: str | None = None
    layer: int | None = None
    stack: str | None = None
    weight_only: bool = False
    unfit: str | None = None
    is_input: bool = False
    tied_to: str | None = None
    experts: int = 1

    @property
    def is_table(self) -> bool:
        """True for a table whose rows are adapted, False for a layer."""
        return self.role in (Role.EMBEDDING, Role.VOCABULARY)

    @property
    def host(self) -> str:
        """Path of the module that carries the adapter module: its own, or that of a parameter's owner."""
        return self.path.rpartition(".")[0] if self.role is Role.PARAMETER else self.path


_EMPTY = vars(nn.Module())
_CONTAINERS = tuple((name, type(value)) for name, value in _EMPTY.items() if isinstance(value, dict | set))


class SmallModule(nn.Module):
    """An `nn.Module` that takes less than half the time to construct; loading an adapter creates hundreds."""

    def __init__(self) -> None:
        state = self.__dict__
        state.update(_EMPTY)
        for name, container in _CONTAINERS:
            state[name] = container()


class AdapterModule(SmallModule):
    """Abstract base: the adapter's part at one module of the base model.

    Three methods, of which a subclass overrides what it needs:

    * ``pre_forward(x) -> x`` changes the module's input; by default it is the identity,
    * ``post_forward(x, y) -> y`` changes its output; by default it is the identity,
    * ``merged_weight(weight, bias)`` expresses the same as a change of its weights; by default it raises.

    Both passes get whole tensors whose last dimension is the feature width and whose first dimension is the rows (or a
    multiple of them). Parameters have the names that PEFT gives them in its files wherever PEFT has the method.

    Example:
        >>> import torch
        >>> class Shift(AdapterModule):
        ...     def post_forward(self, x, y):
        ...         return y + 1
        >>> Shift().post_forward(torch.zeros(2), torch.zeros(2))
        tensor([1., 1.])
    """

    def pre_forward(self, x: Tensor) -> Tensor:
        """Change the input of the base module.

        Args:
            x: Input, (..., in).

        Returns:
            (..., in), what the base module reads in place of ``x``.
        """
        return x

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Change the output of the base module.

        Args:
            x: Input that the module has read, (..., in).
            y: Output, (..., out).

        Returns:
            (..., out), the output in place of ``y``.
        """
        return y

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the adapter merged in.

        Args:
            weight: (out, in).
            bias: (out,), or None.

        Returns:
            New weight (out, in) and bias (out,) or None.

        Raises:
            UnsupportedError: the method is no change of a weight (``Method.mergeable`` is false).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot be merged into a weight")

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the base module's parameters that change when the adapter is merged."""
        return ("weight", "bias")

    def merged_parameters(self, parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return all that `parameter_names` lists, with the adapter merged in.

        Args:
            parameters: The same of the base module, of any shape, by name.
        """
        weight = parameters["weight"]
        assert weight is not None
        weight, bias = self.merged_weight(weight, parameters.get("bias"))
        merged = {"weight": weight, "bias": bias}
        return {name: merged[name] for name in parameters}

    @property
    def shares_weight(self) -> bool:
        """True if the host's weight is another host's, whose module in the same adapter changes it: that one merges."""
        return False

    # -- loading and copying -------------------------------------------------------------------------------------------

    block: Tensor | None = None
    """The one tensor that all parameters are views of, if they were read from a file and do not train: its version
    changes with any of them."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, whose parameters have versions of their own: ``block`` is left out.

        Parameters that lie in one block with others become tensors of their own, since plain pickle would write the
        block once for each of them.
        """
        state = {key: value for key, value in self.__dict__.items() if key != "block"}
        if any(one.untyped_storage().nbytes() > one.nbytes for one in self.parameters()):
            state["_modules"], state["_parameters"] = deepcopy((self._modules, self._parameters))
        return state


class Method(Settings):
    """Settings of one method. Subclasses are final: `LoRA`, `Bottleneck`, `Prefix`, ..."""

    name: ClassVar[str]  # in run files and adapter folders: "lora"
    title: ClassVar[str]  # in reports and messages: "LoRA"
    paper: ClassVar[str]  # authors, year, arXiv number or DOI
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]]
    """Part of the model that changes: single layers, attention (keys and values), input embeddings, all weights."""
    mergeable: ClassVar[bool] = False  # True if an adapter can be merged into the base's weights
    identity_at_start: ClassVar[bool] = False
    """True if, at default settings, a new adapter leaves the model's outputs unchanged."""
    supports_rows: ClassVar[bool] = True
    """True if the rows of one batch may use different adapters of this kind."""
    peft_type: ClassVar[str | None] = None  # PEFT's name of the method, or None if PEFT does not know it
    default_learning_rate: ClassVar[float]  # if `training.learning_rate` is `auto`
    default_head_learning_rate: ClassVar[float | None] = None
    """Learning rate of the head, or None if it is the method's."""

    modules_to_save: tuple[str, ...] | Literal["auto"] = Field(
        default="auto",
        description="modules trained and stored whole with the adapter; auto: the task head, if the model has one",
    )

    @property
    def starts_from_errors(self) -> bool:
        """True if initial values are computed from quantization errors and training rows (LoRA's ``qera``)."""
        return False

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        """Select the modules that this method adapts.

        Args:
            available: A model's modules, task heads left out.

        Raises:
            UnsupportedError: the model has none; the message names what was looked for.
            ConfigError: a target matches nothing; the message lists what there is.
        """
        return []

    def trained_rows(self, tables: Sequence[TargetModule]) -> dict[str, tuple[int, ...]]:
        """Return the rows that this method trains of a model's tables, by the path of the table.

        Args:
            tables: Its embeddings and the layers that score its vocabulary.

        Raises:
            ConfigError, UnsupportedError: a row or a table that the settings name does not exist or cannot be trained.
        """
        return {}

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        """Build the adapter module for one target.

        Args:
            target: The module that it is for.
            module: The base module (read only: shapes, dtype, weights for initialisation).

        Raises:
            UnsupportedError: the method puts nothing into single layers.
        """
        raise UnsupportedError(f"{self.title} puts nothing into single layers")

    def build_all(self, targets: Sequence[TargetModule], modules: Sequence[nn.Module]) -> dict[str, AdapterModule]:
        """Build the adapter modules for all targets, by path; overridden by methods whose modules belong together."""
        built = {target.path: self.build(target, module) for target, module in zip(targets, modules, strict=True)}
        self.connect(targets, built)
        return built

    def build_from(
        self, target: TargetModule, module: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> AdapterModule | None:
        """Build the adapter module around stored parameters, without drawing or copying any.

        Args:
            target: The module that it is for.
            module: The base module.
            parameters: By name, as in the module's ``state_dict``, of any shape.

        Returns:
            None if the method builds first and copies into what it built, or if the parameters are not those it needs.
        """
        return None

    def connect(self, targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> None:
        """Tie together adapter modules that belong together, after all of them were built."""

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the number of trained parameters over these targets, by formula (the head not counted)."""
        return 0

    def learning_rate_factor(self, parameter: str) -> float:
        """Return the factor on the learning rate of an adapter parameter, by its name (LoRA+ uses it)."""
        return 1.0

    def positions(self, causal: bool) -> int:
        """Return the number of the model's positions taken before a row's text.

        Args:
            causal: True for a decoder-only model.
        """
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings as JSON values."""
        return {"name": self.name, **self.model_dump(mode="json")}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Method:
        """Build settings from a mapping, as a run file has them.

        Raises:
            ConfigError: an unknown key or a bad value.
        """
        return parse_settings(cls, values, what=f"method `{cls.name}`", where="method")

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value
