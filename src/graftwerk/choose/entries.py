"""What is compared: methods as people name them, each with a name of its own for folders, tables and charts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method
from graftwerk.methods.catalog import parse_method

LABEL = "label"
LONGEST = 60
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{LONGEST - 1}}}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        name: Short, unique, fit for a folder: ``lora``, ``dora``, ``lora-r16``, or the `label` that was given.
        method: Its settings.
        given: As it was named, for the command that repeats the comparison.
    """

    name: str
    method: Method
    given: Any


def parse_entries(methods: Sequence[Any] | str) -> list[Entry]:
    """Names (`lora`), shorthands (`dora`), mappings (``{name: lora, r: 16}``, also with a `label`), or built methods.

    Raises:
        ConfigError: none; an unknown method or setting; two that are the same.
    """
    listed = (
        [part.strip() for part in methods.split(",") if part.strip()] if isinstance(methods, str) else list(methods)
    )
    if not listed:
        raise ConfigError("no methods are given to compare", mend="for instance methods=full,lora,bottleneck")
    entries: list[Entry] = []
    for given in listed:
        entry = _entry(given)
        for other in entries:
            if other.method == entry.method:
                raise ConfigError(
                    f"`{other.name}` and `{entry.name}` are the same method with the same settings", where="methods"
                )
            if other.name.lower() == entry.name.lower():  # folders may not tell case apart
                raise ConfigError(
                    f"two methods would be called `{entry.name}`",
                    where="methods",
                    mend="give one of them a label: {label: large, name: ..., ...}",
                )
        entries.append(entry)
    return entries


def _entry(given: Any) -> Entry:
    if isinstance(given, Method):
        changed = given.model_dump(mode="json", exclude_defaults=True)
        return Entry(_slug(given.name, changed), given, {"name": given.name, **changed})
    if not isinstance(given, Mapping):
        return Entry(_slug(str(given), {}), parse_method(given), given)
    values = dict(given)
    label = values.pop(LABEL, None)
    method = parse_method(values)
    if label is None:
        name = _slug(str(values["name"]), {key: value for key, value in values.items() if key != "name"})
    elif isinstance(label, str) and _NAME.fullmatch(label):
        name = label
    else:
        raise ConfigError(
            f"a label is 1 to {LONGEST} letters, digits and . _ + -, not {label!r:.80}", where=f"methods.{LABEL}"
        )
    return Entry(name, method, dict(given))


def _slug(name: str, settings: Mapping[str, Any]) -> str:
    """`lora` and ``{r: 16, target_modules: all-linear}`` -> ``lora-r16-target_modules-all-linear``."""
    parts = [name]
    for key, value in settings.items():
        text = re.sub(r"[^A-Za-z0-9._+]+", "-", str(value)).strip("-") or "none"
        parts.append(f"{key}{'' if text[0].isdigit() else '-'}{text}")
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join(parts))
    if len(slug) > LONGEST:
        raise ConfigError(
            f"`{slug}` is too long for a name", where="methods", mend="give it a label: {label: large, name: ..., ...}"
        )
    return slug


def parse_seeds(seeds: Sequence[int] | int | str) -> list[int]:
    """`[0, 1, 2]`, `3` (one seed, the number 3) or `"0,1,2"`.

    Raises:
        ConfigError: none, one twice, or something that is no seed.
    """
    if isinstance(seeds, str):
        parts: list[Any] = [part.strip() for part in seeds.split(",") if part.strip()]
    else:
        parts = [seeds] if isinstance(seeds, int) else list(seeds)
    found: list[int] = []
    for part in parts:
        try:
            seed = int(part)
        except (TypeError, ValueError):
            seed = -1
        if seed < 0 or isinstance(part, bool | float):
            raise ConfigError(f"{part!r:.40} is no seed", where="seeds", mend="whole numbers from 0 on: seeds=0,1,2")
        if seed in found:
            raise ConfigError(
                f"seed {seed} is given twice: the same run again would only look like evidence", where="seeds"
            )
        found.append(seed)
    if not found:
        raise ConfigError("no seeds are given", where="seeds", mend="seeds=0,1,2")
    return found
