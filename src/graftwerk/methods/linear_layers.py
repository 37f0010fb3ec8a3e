"""The choice of linear layers that the methods for them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from graftwerk.methods.base import TargetModule
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
