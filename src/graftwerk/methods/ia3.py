"""IA3: learned vectors that scale keys, values and the feed-forward's inner activations.

Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3:

    keys: l_k * (W_k x)     values: l_v * (W_v x)     feed-forward: W_2 (l_ff * f(W_1 x))        all l start at one

Parameters: out for each scaled projection, in for each feed-forward output layer. A projection that makes query, key
and value at once is scaled whole, as PEFT does.
Trade-off: a few thousand parameters, nothing at inference once merged; it can only scale what is there, so it wants
high learning rates and reaches less on tasks far from pretraining.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.layer_selection import LayerSelection
from graftwerk.methods.target_modules import check_targets, endings, linear_layers, named_by, select

_SCALED = (Role.KEY, Role.VALUE, Role.FUSED_QKV, Role.FFN_OUT)


class IA3(LayerSelection):
    """Settings of IA3: the targets, if they are not the paper's.

    Example:
        >>> IA3(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).target_modules
        ('k_proj', 'down_proj')
    """

    name = "ia3"
    title = "IA3"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "IA3"
    default_learning_rate = 1e-2

    target_modules: tuple[str, ...] | Literal["auto"] = Field(
        default="auto",
        description="layers to scale, the feed-forward ones included; auto: keys, values, feed-forward outputs",
    )
    feedforward_modules: tuple[str, ...] | Literal["auto"] = Field(
        default="auto", description="those of the targets whose input is scaled, not their output"
    )

    @field_validator("target_modules", "feedforward_modules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list | set) else value

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        """Select the modules to scale.

        Raises:
            UnsupportedError: the roles of the model's layers are not known and none were named.
            ConfigError: a name matches nothing, or a feed-forward module is none of the targets.
        """
        linear = linear_layers(available)
        if self.target_modules == "auto":
            chosen = [target for target in linear if target.role in _SCALED]
            if not chosen:
                raise UnsupportedError(
                    "which layers of this model make keys and values is not known",
                    where="method.target_modules",
                    hint="list target_modules and feedforward_modules by name",
                )
        else:
            chosen = select(available, self.target_modules)
        chosen = self.filter_layers(chosen, available)
        if self.target_modules != "auto":
            check_targets(chosen, self.target_modules)
        if self.feedforward_modules != "auto":
            known = named_by(chosen)
            for name in self.feedforward_modules:
                if name not in known:
                    raise ConfigError(
                        f"feedforward_modules: `{name}` is none of the targets", where="method.feedforward_modules"
                    )
        return chosen

    def scales_input(self, target: TargetModule) -> bool:
        """Return True if the input of this module is scaled, and not its output."""
        if self.feedforward_modules == "auto":
            return target.role is Role.FFN_OUT
        return any(ending in self.feedforward_modules for ending in endings(target.path))

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        return IA3Module(
            target.in_features if self.scales_input(target) else target.out_features, self.scales_input(target)
        )

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of out over scaled projections and of in over feed-forward outputs."""
        return sum(p.in_features if self.scales_input(p) else p.out_features for p in targets)


class IA3Module(AdapterModule):
    """A trained vector that scales the input or the output of one layer; starts at one.

    Args:
        width: Length of the vector.
        scales_input: True for l * x, with ``ia3_l`` (1, in); else l * y, with ``ia3_l`` (out, 1): PEFT's shapes.
    """

    def __init__(self, width: int, scales_input: bool) -> None:
        super().__init__()
        self.scales_input = scales_input
        self.ia3_l = nn.Parameter(torch.ones((1, width) if scales_input else (width, 1)))

    def pre_forward(self, x: Tensor) -> Tensor:
        """Return l * x, (..., in), if the input is scaled, else x."""
        return (x * self.ia3_l.flatten()).to(x.dtype) if self.scales_input else x

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return l * y, (..., out), if the output is scaled, else y."""
        return y if self.scales_input else (y * self.ia3_l.flatten()).to(y.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # ia3_l (1, in) scales columns, (out, 1) scales rows; only the latter reaches the bias.
        merged = (weight * self.ia3_l).to(weight.dtype)
        if self.scales_input or bias is None:
            return merged, bias
        return merged, (bias * self.ia3_l.flatten()).to(bias.dtype)
