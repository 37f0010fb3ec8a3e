"""The root of every settings model: frozen, unknown keys refused, every field described.

The description of a field is what `graftwerk schema` and the docs show; it is written once, there.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen pydantic model; unknown keys are errors, aliases and field names are both accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


def known_keys(model: type[Settings]) -> set[str]:
    """Field names and their accepted other spellings."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        choices = getattr(field.validation_alias, "choices", ())
        keys.update(choice for choice in choices if isinstance(choice, str))
    return keys
