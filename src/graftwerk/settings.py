"""The root of every settings model: frozen, unknown keys refused, every field described.

The description of a field is what `graftwerk schema` and the docs show; it is written once, there.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen pydantic model; unknown keys are errors, aliases and field names are both accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())
