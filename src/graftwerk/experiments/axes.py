"""Several values for one setting: read from an argument or from Python, and written as an argument that is read so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from graftwerk.errors import ConfigError
from graftwerk.yaml_files import parse_override_value


def several(given: Any, key: str, *, takes_list: bool = False) -> list[Any] | None:
    """Return the values that are given for a setting, or None if that is a single value.

    Args:
        given: ``"4,8"``, ``"attention,[q_proj, v_proj]"``, or a sequence of values.
        key: The setting.
        takes_list: True if a list may be one value of it; several values are then a list with a list in it.

    Raises:
        ConfigError: A value is empty, or not YAML.

    Example:
        >>> several("attention,[q_proj, v_proj]", "target_modules"), several("8", "r")
        (['attention', ['q_proj', 'v_proj']], None)
    """
    values = split(given) if isinstance(given, str) else given
    if not isinstance(values, Sequence) or (isinstance(given, str) and len(values) < 2):
        return None
    if takes_list and values is given and not any(isinstance(each, list | tuple) for each in values):
        return None
    if not values or any(isinstance(each, str) and not each.strip() for each in values):
        hint = "commas stand between values, and none at the end"
        raise ConfigError(f"`{key}` has an empty value among those to try", where=key, hint=hint)
    return [parse_override_value(each.strip(), key) if isinstance(each, str) else each for each in values]


def as_list(argument: str) -> str:
    """Return ``key=[a],[a, b]``, which is no YAML, as ``key=[[a],[a, b]]``; any other argument as it is.

    Example:
        >>> as_list("target_modules=[q_proj],[q_proj, v_proj]"), as_list("r=4,8")
        ('target_modules=[[q_proj],[q_proj, v_proj]]', 'r=4,8')
    """
    key, equals, values = argument.partition("=")
    return f"{key}=[{values}]" if equals and values.lstrip().startswith("[") and len(split(values)) > 1 else argument


def split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def written(values: Sequence[Any]) -> str:
    """Return several values as one argument: one YAML list if a list is among them, or else with commas between.

    Example:
        >>> written([4, 8]), written([["q_proj"], "attention"])
        ('4,8', '[[q_proj], attention]')
    """
    if any(isinstance(value, list | tuple) for value in values):
        return flow([list(value) if isinstance(value, tuple) else value for value in values])
    return ",".join(map(text_of, values))


def flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n")
    return text.strip()


def text_of(value: Any) -> str:
    """Return a value as the command line has it: ``8``, ``attention``, ``[q_proj, v_proj]``."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
