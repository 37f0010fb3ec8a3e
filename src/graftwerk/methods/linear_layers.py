"""Shared parts of the methods for linear layers: the choice of layers, dropout on the input of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.methods.base import AdapterModule, TargetModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.dropout import DropoutGroup, dropout
from graftwerk.methods.layer_selection import LayerSelection
from graftwerk.methods.target_modules import check_inputs, check_targets, linear_targets

Rank = Annotated[int, Field(ge=1, le=65536)]


class LinearLayerMethod(LayerSelection):
    """Abstract: a method that adapts the linear layers that ``target_modules`` names."""

    target_modules: tuple[str, ...] | Literal["attention", "all-linear"] = Field(
        "all-linear", description="attention, all-linear, or names or suffixes of linear layers"
    )

    needs_target_modules: ClassVar[bool] = True
    """True if an empty `target_modules` leaves the method nothing to adapt."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _target_modules(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("attention", "all-linear"):
            return (value,)
        if isinstance(value, list | set | tuple) and not value and cls.needs_target_modules:
            raise ValueError("target_modules is empty: nothing would be adapted")
        return tuple(value) if isinstance(value, list | set) else value

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        chosen = self.filter_layers(linear_targets(available, self.target_modules), available)
        if isinstance(self.target_modules, tuple):
            check_targets(chosen, self.target_modules)
        for setting in type(self).model_fields:
            if setting.endswith("_dropout") and getattr(self, setting):
                check_inputs(chosen, setting)
        return chosen


class InputDropout(AdapterModule):
    """Abstract: an adapter module whose update reads its input with entries dropped while training.

    Args:
        p: Probability of dropping an entry.
    """

    dropout: float
    group: DropoutGroup

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.__dict__.update(dropout=p, group=DropoutGroup())  # past the checks of `__setattr__`, as in `Factor`

    @property
    def p(self) -> float:
        """Probability of dropping an entry now: 0 outside training."""
        return self.dropout if self.training else 0.0

    def seed(self, x: Tensor) -> int:
        """Return the seed of the mask on ``x`` (..., in), the same for all modules of the group."""
        return self.group.seed(x, self)

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x (..., in) as the update reads it: in the dtype of the parameters, entries dropped while training."""
        h = x.to(dtype)
        if self.p and torch.compiler.is_compiling():
            return F.dropout(h, self.p)  # no seed can be read inside a graph, whose compiler fuses torch's own mask
        return dropout(h, self.p, self.seed(x)) if self.p else h


class WeightUpdate(InputDropout, ABC):
    """Abstract: h = W x + U(W) dropout(x), the update U (out, in) being a function of the weight W.

    Args:
        base: The adapted layer, whose weight is read in every pass. It is never registered as a child.
        p: Probability of dropping an entry of the input of U while training.
    """

    def __init__(self, base: nn.Module, p: float = 0.0) -> None:
        super().__init__(p)
        self._base = (base,)  # in a tuple, so that it is no child

    @abstractmethod
    def weight_update(self, weight: Tensor) -> Tensor:
        """Return U (out, in) for the weight W (out, in), in the dtype of the parameters."""

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        update = self.weight_update(base_weight(self._base[0]))  # (out, in)
        return y + F.linear(self.dropped(x, update.dtype), update).to(y.dtype)  # (..., in) -> (..., out)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = self.weight_update(weight)  # (out, in)
        return (weight.to(torch.promote_types(weight.dtype, update.dtype)) + update).to(weight.dtype), bias
