"""The root of every settings model: frozen, unknown keys refused, every field described.

The description of a field is what `graftwerk schema` and the docs show; it is written once, there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator


class Settings(BaseModel):
    """Frozen pydantic model; unknown keys are errors, aliases and field names are both accepted."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        """Raise ValueError for values that files or libraries cannot represent, once for all settings."""
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if isinstance(each, PurePath):
                each = str(each)
            if type(each) is int and not -(2**63) <= each < 2**63:
                raise ValueError("this number does not fit into 64 bits")
            if isinstance(each, str) and not each.isascii() and any("\ud800" <= sign <= "\udfff" for sign in each):
                raise ValueError("this text holds half a character (a lone surrogate)")
            if isinstance(each, str) and "\0" in each:
                raise ValueError("this text holds a NUL character")
            if isinstance(each, Mapping):
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, list | tuple):
                waiting += each
        return value


def _name(value: Any) -> Any:
    """YAML reads the class `1` as a number, and `yes` as true, whose spelling is lost."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"YAML reads this name as {value}: put it in quotes")
    return str(value) if isinstance(value, int | float) else value


Name = Annotated[str, BeforeValidator(_name)]
"""A name out of the data (a class, a column), which may be a number."""
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(points?|%|percent)?")


def _amount(value: Any) -> str:
    """A number alone counts points."""
    found = _AMOUNT.fullmatch(str(value).strip())
    if found is None:
        raise ValueError("an amount such as `2 points` or `5 %`")
    return f"{float(found[1]):g} {'%' if found[2] in ('%', 'percent') else 'points'}"


Amount = Annotated[str, BeforeValidator(_amount)]
"""A loss that is allowed: `2 points`, or `5 %` of the value before."""
