"""LoRA on bare parameters: one low-rank update for each expert of a mixture-of-experts model.

Such a model holds the weights of its experts in one parameter, (E, out, in), which its own code indexes:

    W'_e = W_e + s B_e A_e        A_e (r, in), B_e (out, r), e = 1 ... E

Stored as PEFT stores them: A (E r, in), the rows of an expert together, and B (out, r E), the experts of a rank
together, so that A_e = A[e r : (e + 1) r] and B_e[:, k] = B[:, k E + e]. A parameter (out, in) has E = 1. If a module
says that its experts are transposed, (E, in, out), the transposed product is added.

Parameters: E r (in + out) for each parameter.
Trade-off: reaches the experts, where most weights of such a model are; the whole sum is formed in each forward pass,
which takes as much memory as the parameter, and in training stays until the backward pass (gradient checkpointing forms
it again). There is no input to drop from, hence no dropout; DoRA, PiSSA and QERA are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.linear_layers import LinearLayerMethod
from graftwerk.methods.low_rank import Factor
from graftwerk.methods.target_modules import check_targets, endings, named_by

SETTING = "target_parameters"


class ParameterLoRA(AdapterModule):
    """LoRA on one parameter: W_e + s B_e A_e for each of its E matrices.

    Args:
        a: A, (E r, in).
        b: B, (out, r E).
        scale: s.
        experts: E.
        transposed: True for a parameter (E, in, out).

    Example:
        >>> lora = ParameterLoRA(nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2)), 0.5, experts=2)
        >>> lora.merged_value(torch.zeros(2, 4, 3))[1, 0].tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self, a: nn.Parameter, b: nn.Parameter, scale: float, experts: int = 1, transposed: bool = False
    ) -> None:
        super().__init__()
        self.lora_A, self.lora_B = Factor(a), Factor(b)
        self.scale, self.experts, self.transposed = scale, experts, transposed

    @classmethod
    def from_base(
        cls, target: TargetModule, module: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float
    ) -> ParameterLoRA:
        """Return LoRA for one parameter.

        Args:
            target: The parameter.
            module: The module that owns it.
            a: A, (E r, in).
            b: B, (out, r E).
            scale: s.

        Returns:
            The module for a parameter (E, out, in), or (E, in, out) if its owner says so.
        """
        return cls(a, b, scale, target.experts, is_stored_transposed(module, target.experts))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the two factors of the update, in the dtype of the parameter as in PEFT, in the order of its sides."""
        a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        a = a.reshape(self.experts, -1, a.shape[1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)  # (E, out, r)
        return (a.mT, b.mT) if self.transposed else (b, a)

    def merged_value(self, value: Tensor) -> Tensor:
        """Return a parameter with the update added.

        Args:
            value: (E, out, in), transposed (E, in, out), or (out, in) if E is 1.

        Returns:
            A new tensor of the same shape and dtype.
        """
        # Autocast would form the sum in half precision; the parameter has the dtype that it has.
        with torch.autocast(value.device.type, enabled=False):
            left, right = self._factors(value.dtype)
            whole = value if value.dim() == 3 else value.unsqueeze(0)  # (E, out, in)
            return torch.baddbmm(whole, left, right, alpha=self.scale).view(value.shape)

    def merge_(self, value: Tensor) -> None:
        """Add the update in place to a parameter (E, out, in), transposed (E, in, out), or (out, in)."""
        left, right = self._factors(value.dtype)
        (value if value.dim() == 3 else value.unsqueeze(0)).baddbmm_(left, right, alpha=self.scale)


def is_stored_transposed(module: nn.Module, experts: int) -> bool:
    """Return True if a module says that its parameters are (E, in, out), as transformers' GPT-OSS does."""
    return experts > 1 and bool(getattr(module, "is_transposed", False))


class ParameterAdapters(AdapterModule):
    """The updates of one adapter for the parameters of one module, each under its parameter's name.

    Args:
        updates: By parameter name.
    """

    def __init__(self, updates: Mapping[str, ParameterLoRA]) -> None:
        super().__init__()
        self._modules.update(updates)  # `add_module` would refuse names that are attributes

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def update_of(self, name: str) -> ParameterLoRA:
        """Return the update for one parameter of the module."""
        update = self._modules[name]
        assert isinstance(update, ParameterLoRA)
        return update

    def merged_parameters(self, parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        merged: dict[str, Tensor | None] = {}
        for name in self._modules:
            value = parameters[name]
            assert value is not None
            merged[name] = self.update_of(name).merged_value(value)
        return merged


class ParameterSelection(LinearLayerMethod):
    """Abstract: a method for linear layers that can adapt bare parameters beside them."""

    needs_target_modules = False
    target_parameters: tuple[str, ...] | None = Field(
        default=None,
        description="endings of the paths of parameters of two or three dimensions, such as the experts of a mixture "
        "(mlp.experts.gate_up_proj); beside target_modules, or alone with target_modules: []",
    )

    @field_validator(SETTING, mode="before")
    @classmethod
    def _parameters(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) or None if isinstance(value, list | tuple | set) else value

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        modules = [target for target in available if target.role is not Role.PARAMETER]
        chosen = super().select_targets(modules) if self.target_modules else []
        return chosen + self.select_parameters(available, chosen)

    def refuse_variants(self, **variants: float) -> None:
        """Refuse settings that parameters cannot have, as PEFT does.

        Args:
            **variants: Their values, zero or false if they are off, by name.

        Raises:
            ValueError: One is on, and parameters are targeted.
        """
        used = [name for name, value in variants.items() if value]
        if self.target_parameters and used:
            raise ValueError(f"{SETTING} and {used[0]} exclude each other")

    def select_parameters(
        self, available: Sequence[TargetModule], modules: Sequence[TargetModule]
    ) -> list[TargetModule]:
        """Return the parameters that ``target_parameters`` names, in the chosen layers.

        Args:
            available: A model's modules and parameters.
            modules: The modules that are adapted as well.

        Raises:
            ConfigError: a name matches nothing, or a parameter of a layer that is adapted as a module.
            UnsupportedError: a parameter has not two or three dimensions, or cannot be read through an adapter.
        """
        if not self.target_parameters:
            return []
        parameters = [target for target in available if target.role is Role.PARAMETER]
        known, wanted = named_by(parameters), frozenset(self.target_parameters)
        for name in self.target_parameters:
            if name not in known:
                ends = sorted({".".join(target.path.split(".")[-2:]) for target in parameters if not target.unfit})
                raise ConfigError(
                    f"{SETTING}: `{name}` matches no parameter of this model",
                    where=f"method.{SETTING}",
                    hint=did_you_mean(name, ends, f"The parameters end in: {', '.join(ends[:30])}"),
                )
        found = [target for target in parameters if not wanted.isdisjoint(endings(target.path))]
        hosts = {module.path for module in modules}
        for target in found:
            if target.unfit is not None:
                raise UnsupportedError(
                    f"{SETTING}: no adapter works on `{target.path}`: {target.unfit}",
                    where=f"method.{SETTING}",
                    hint="name parameters of two or three dimensions",
                )
        chosen = self.filter_layers(found, [target for target in available if target.role is not Role.PARAMETER])
        check_targets(chosen, self.target_parameters, SETTING)
        for target in chosen:
            if target.host in hosts:
                raise ConfigError(
                    f"{SETTING}: `{target.path}` belongs to a layer that target_modules adapts as well",
                    where=f"method.{SETTING}",
                    hint="name the layer in one of both; target_modules: [] adapts the parameters alone",
                )
        return chosen
