"""The contract that every method keeps, and nothing about how it gets into a model.

A method is a frozen settings object (`LoRA(r=8)`) that knows three things: which *places* of a model it wants (by
role, never by an architecture's names), how many parameters that costs (a formula), and how to build the module that
goes there.

Two kinds of module exist for places inside a layer (`Delta`), and one each for attention (`prefix.py`) and the input
embedding (`prompt.py`, `ptuning.py`). Legend used throughout: B rows, T tokens, H heads, G key/value heads, D head
width, d model width, r rank, n virtual tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.seal import Seal
from graftwerk.methods.stacked import StackedDelta
from graftwerk.settings import Settings, parse_settings


class Role(StrEnum):
    """What a module is for, whatever its architecture calls it."""

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
    NORM = "norm"
    HEAD = "head"
    """A linear layer outside the base model (`lm_head`, `classifier`): adapted only where a target names it."""
    LOOSE_BIAS = "loose_bias"
    """A bias that is not added to the features of a layer's output (of a convolution, of attention scores): listed so
    that a method can say that it leaves it out."""


ATTENTION_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.FUSED_QKV, Role.ATTENTION_OUT})


@dataclass(frozen=True)
class Place:
    """One module of a model that a delta can go into.

    Attributes:
        path: Its dotted path in the model, as in `named_modules()`.
        role: What it is for.
        in_features, out_features: Its widths; equal for a norm.
        has_bias: Whether it has a bias vector.
        ffn: Identifies the feed-forward block that it belongs to (the same text for its first and its last layer).
        layer: Index of its layer within its stack, or None outside the layers.
        stack: Which stack of layers that is: ``encoder``, ``decoder`` or ``causal``; in a model whose architecture is
            not known the path of the list of layers.
        weight_only: Whether its parent reads its weight and bias and never calls it. An adapter there changes what is
            read, and cannot differ by row; such a layer is left out unless it is named.
        unfit: Why no adapter works in this layer (it returns a tuple, ...), or None if one does. Such a layer is left
            out, and refused with this reason if it is named.
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


class Delta(nn.Module):
    """What an adapter adds to one module: it may change what goes in and what comes out.

    A layer with active deltas computes ``y = layer(enter(x))`` and then ``leave(x, y)`` for each. Both get whole
    tensors whose last dimension is the feature width; the first dimension is the rows (or a multiple of the rows). A
    module's own parameters are called as PEFT calls them in its files wherever PEFT has the method.
    """

    seal: Seal | None = None
    """Tells of changes of all parameters, where these were read from a file and do not train."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle writes down. Parameters that lie in one block with others, as those read from a file do,
        become tensors of their own: plain pickle would write the block once for each of them.
        """
        state = self.__dict__.copy()
        if any(one.untyped_storage().nbytes() > one.nbytes for one in self.parameters()):
            state["seal"] = None
            state["_modules"], state["_parameters"] = deepcopy((self._modules, self._parameters))
        return state

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def through(self, layer: nn.Module, x: Tensor, others: Sequence[Delta]) -> Tensor | None:
        """The layer, this delta and the ``others`` that are active after it in one, where there is a faster way that
        gives the same; None: take the plain way. ``layer.forward`` must not be called here.
        """
        return None

    def kin(self) -> Hashable | None:
        """What deltas must have in common to be stacked (see stacked.py); None: this one works alone just now."""
        return None

    @property
    def breadth(self) -> int:
        """The size that stacking fills up to the largest: rank, bottleneck. Far apart, they are stacked apart."""
        return 1

    @staticmethod
    def stacked(deltas: Sequence[Any]) -> StackedDelta:
        """The stacked form of deltas of one `kin`, one for each entry; the same delta may stand there several times.

        Differentiable with respect to the deltas' parameters.
        """
        raise NotImplementedError

    def sources(self) -> list[Tensor]:
        """All tensors that the stacked form is made from: where a version of one changes, it is made again."""
        own = [*self.parameters(), *self.buffers()]
        return [self.seal.block] if self.seal is not None and self.seal.covers(own) else own

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias with this delta in them. Only for methods with ``mergeable``."""
        raise UnsupportedError(f"{type(self).__name__} cannot be folded into a weight")

    def fold_(self, weight: Tensor, bias: Tensor | None) -> None:
        """`folded`, in place."""
        new_weight, new_bias = self.folded(weight, bias)
        for own, new in ((weight, new_weight), (bias, new_bias)):
            if own is not None and new is not None and new.data_ptr() != own.data_ptr():
                own.copy_(new)


class Method(Settings):
    """Settings of one method. Subclasses are final: `LoRA`, `Bottleneck`, `Prefix`, ..."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]]
    mergeable: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False
    rows: ClassVar[bool] = True
    """Whether different rows of one batch may use different adapters of this kind."""
    peft_type: ClassVar[str | None] = None
    default_learning_rate: ClassVar[float]
    default_head_learning_rate: ClassVar[float | None] = None
    """None: the same as the method's."""

    modules_to_save: tuple[str, ...] | Literal["auto"] = Field(
        default="auto",
        description="modules trained and stored whole with the adapter; auto: the task head, if the model has one",
    )

    def places(self, available: Sequence[Place]) -> list[Place]:
        """Of all places of a model (heads left out), those this method wants.

        Raises:
            UnsupportedError: the model has none; the message names what was looked for.
            ConfigError: a target names nothing; the message lists what there is.
        """
        return []

    def build(self, place: Place, module: nn.Module) -> Delta:
        """The delta for one place; ``module`` is the base module (read only: shapes, dtype, weights for
        initialisation).
        """
        raise UnsupportedError(f"{self.title} puts nothing into single layers")

    def assemble(self, places: Sequence[Place], modules: Sequence[nn.Module]) -> dict[str, Delta]:
        """The deltas for all places, by path; for methods whose deltas belong together, in place of `build`."""
        return {place.path: self.build(place, module) for place, module in zip(places, modules, strict=True)}

    def around(
        self, places: Sequence[Place], modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], trainable: bool
    ) -> dict[str, Delta] | None:
        """As `assemble`, with stored tensors (by raw key: path and parameter) as the deltas' parameters, not copied; on
        the device and in the mode of their base modules.

        None: this method builds its deltas first and copies into them; or the tensors are not exactly those wanted.
        """
        return None

    def count(self, places: Iterable[Place]) -> int:
        """Trained parameters over these places, by formula (the head not counted)."""
        return 0

    def learning_rate_factor(self, parameter: str) -> float:
        """Factor on the learning rate of a parameter of a delta, by its name (LoRA+ uses it)."""
        return 1.0

    def positions(self, causal: bool) -> int:
        """Return how many positions of the model are taken before a row's text.

        Args:
            causal: Whether the model is a decoder-only one.
        """
        return 0

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.model_dump(mode="json")}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Method:
        return parse_settings(cls, values, what=f"method `{cls.name}`", where="method")

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), detached: GPT-2's `Conv1D` is turned, a 4- or 8-bit one is unpacked.

    Raises:
        UnsupportedError: it holds codes that are not known here.
    """
    weight = stored_weight(module)
    if weight.is_meta and OFFLOAD_HOOK in module.__dict__:
        with onloaded(module):
            return base_weight(module)
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).detach()  # type: ignore[no-any-return]
    if is_quantized(weight):
        scale = getattr(weight, "SCB", None)
        if scale is None:
            scale = getattr(getattr(module, "state", None), "SCB", None)  # where the first pass moves it
        if weight.dtype != torch.int8 or not isinstance(scale, Tensor):
            raise UnsupportedError(f"the weights of this {type(module).__name__} are codes that cannot be read here")
        return weight.detach().float() * (scale.to(weight.device)[:, None] / 127)
    return weight.detach().T if is_transposed(module) else weight.detach()


def stored_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight without the deltas that an adapted layer may show to others, as it is stored."""
    weight = module._parameters.get("weight")
    if weight is None:  # computed from others, by a parametrization
        weight = module.weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    return weight


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight holds codes (bitsandbytes' 4 or 8 bits) and not numbers to compute with."""
    return hasattr(weight, "quant_state") or not weight.is_floating_point()


OFFLOAD_HOOK = "_hf_hook"
"""Where accelerate keeps the hook of a module, which loads offloaded weights before its forward pass."""


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Load the weights of a module and its children that accelerate has offloaded, inside the block."""
    parts = [part for part in module.modules() if OFFLOAD_HOOK in part.__dict__ and _is_offloaded(part)]
    for part in parts:
        part.__dict__[OFFLOAD_HOOK].pre_forward(part)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__[OFFLOAD_HOOK].post_forward(part, None)


def _is_offloaded(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a base module computes: that of its own weights, or of its first child's.

    Offloaded weights compute where accelerate loads them to. The CPU stands for a module without weights, and for one
    whose weights are not loaded yet.
    """
    for part in module.modules():
        own = next((parameter for parameter in part._parameters.values() if parameter is not None), None)
        if own is not None:
            if not own.is_meta:
                return own.device
            return torch.device(getattr(part.__dict__.get(OFFLOAD_HOOK), "execution_device", None) or "cpu")
    return torch.device("cpu")


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out), as transformers' `Conv1D` does."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
