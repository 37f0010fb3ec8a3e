"""Methods and seeds of a comparison, parsed; each method gets a unique name for folders, tables and charts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method
from graftwerk.methods.registry import parse_method
from graftwerk.settings_parsing import parse_settings
from graftwerk.training.settings import TrainingSettings

LABEL = "label"
RATES = ("learning_rate", "head_learning_rate")
"""Settings of the training that an entry may have for itself: no one rate suits all methods."""
NO_AXES = frozenset({"seed", "report_to", "class_weights", "warm_start", "trunk_cache_dir"})
"""Settings of the training that take no several values to try: they may be a list, or have an argument of their own."""
LONGEST = 60
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{LONGEST - 1}}}", re.ASCII)


@dataclass(frozen=True)
class MethodSpec:
    """One method of a comparison.

    Attributes:
        name: Short, unique, fit for a folder: ``lora``, ``dora``, ``lora-r16``, or the `label` that was given.
        method: Its settings.
        given: As it was named, for the command that repeats the comparison.
        changes: Settings of the run file that are others for this entry alone, by dotted key.
        tried_for: Name of the method that this entry is one of several trials for, or "" if it stands for itself.
    """

    name: str
    method: Method
    given: Any
    changes: Mapping[str, Any] = field(default_factory=dict)
    tried_for: str = ""

    def changed(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Return a run file's content with this method and its changes, those of the method among them."""
        tree = {**tree, "method": self.method.to_dict()}
        for key, value in self.changes.items():
            part, _, name = key.partition(".")
            tree[part] = {**tree[part], name: value}
        return tree


def parse_method_specs(methods: Sequence[Any] | str) -> list[MethodSpec]:
    """Parse the methods of a comparison.

    Args:
        methods: Names (`lora`), shorthands (`dora`), mappings (``{name: lora, r: 16}``, perhaps with a `label` and a
            learning rate), or method objects; or names separated by commas.

    Raises:
        ConfigError: There is no method, an unknown method or setting, or the same method twice.
    """
    listed = (
        [part.strip() for part in methods.split(",") if part.strip()] if isinstance(methods, str) else list(methods)
    )
    if not listed:
        raise ConfigError("no methods are given to compare", hint="for instance methods=full,lora,bottleneck")
    entries: list[MethodSpec] = []
    for given in listed:
        entry = _entry(given)
        for other in entries:
            if other.method == entry.method and other.changes == entry.changes:
                raise ConfigError(
                    f"`{other.name}` and `{entry.name}` are the same method with the same settings", where="methods"
                )
            if other.name.lower() == entry.name.lower():  # folders may not tell case apart
                raise ConfigError(
                    f"two methods would be called `{entry.name}`",
                    where="methods",
                    hint="give one of them a label: {label: large, name: ..., ...}",
                )
        entries.append(entry)
    return entries


def settings_not_used(entries: Sequence[MethodSpec], own: Any) -> list[str]:
    """Return a note for each method named without settings for which the run file has settings that are not used.

    Args:
        entries: The methods compared.
        own: The run file's method, as it is written there.
    """
    try:
        method = parse_method(own)
    except ConfigError:
        return []  # it is replaced anyway
    said = []
    written = method.to_dict()
    for entry in entries:
        compared = entry.method.to_dict()
        differing = {key: value for key, value in written.items() if compared.get(key) != value}
        if entry.given == method.name and differing:
            wanted = yaml.safe_dump(
                [{"name": method.name, **differing}], default_flow_style=True, sort_keys=False, width=10_000
            )
            wanted = wanted.strip()
            settings = ", ".join(f"{key}={value}" for key, value in differing.items())
            said.append(
                f"{entry.name} is compared at its defaults, without the run file's {settings}; methods='{wanted}' "
                f"compares it as the file has it"
            )
    return said


def with_and_without(
    entries: Sequence[MethodSpec], augment: Sequence[str] | str | None, augmented: bool
) -> list[MethodSpec]:
    """Cross methods with augmentation: each with the augmented rows of the run file, without them, or both.

    Args:
        entries: The methods.
        augment: `with`, `without`, or both; or None for the methods as they are.
        augmented: True if the run file has `data.augment`.

    Raises:
        ConfigError: Another word, a word twice, no `data.augment` in the run file, or two methods of the same name.
    """
    if augment is None:
        return list(entries)
    words = [word.strip() for word in augment.split(",")] if isinstance(augment, str) else list(augment)
    if not words or len(set(words)) < len(words) or not set(words) <= set(AUGMENT):
        raise ConfigError(f"{augment!r:.80} is not understood", where="augment", hint="augment=with,without")
    if not augmented:
        raise ConfigError(
            "the run file asks for no augmented rows, so there is nothing to do with and without",
            where="augment",
            hint="for instance data.augment: [word_dropout] in the run file",
        )
    crossed = []
    for entry in entries:
        for word in words:
            ending, changes = AUGMENT[word]
            crossed.append(replace(entry, name=f"{entry.name}{ending}", changes={**entry.changes, **changes}))
    names = [entry.name.lower() for entry in crossed]
    if len(set(names)) < len(names):
        raise ConfigError("two of these would have the same name", where="methods", hint="give one of them a label")
    return crossed


AUGMENT: dict[str, tuple[str, dict[str, Any]]] = {
    "with": ("-augmented", {}),
    "without": ("-plain", {"data.augment": []}),
}
"""Word -> what it puts behind a method's name, and what it changes."""


def _entry(given: Any) -> MethodSpec:
    if isinstance(given, Method):
        changed = given.model_dump(mode="json", exclude_defaults=True)
        return MethodSpec(slug(given.name, changed), given, {"name": given.name, **changed})
    if not isinstance(given, Mapping):
        return MethodSpec(slug(str(given), {}), parse_method(given), given)
    values = dict(given)
    label = values.pop(LABEL, None)
    method = parse_method({key: value for key, value in values.items() if key not in RATES})
    changes = {f"training.{key}": values[key] for key in RATES if key in values}
    parse_settings(
        TrainingSettings, {key: values[key] for key in RATES if key in values}, what="an entry", where="methods"
    )
    if label is None:
        name = slug(str(values["name"]), {key: value for key, value in values.items() if key != "name"})
    elif isinstance(label, str) and _NAME.fullmatch(label):
        name = label
    else:
        raise ConfigError(
            f"a label is 1 to {LONGEST} letters, digits and . _ + -, not {label!r:.80}", where=f"methods.{LABEL}"
        )
    return MethodSpec(name, method, dict(given), changes)


def slug(name: str, settings: Mapping[str, Any]) -> str:
    """Return a name for a method with settings.

    Raises:
        ConfigError: It is too long for a folder.

    Example:
        >>> slug("lora", {"r": 16, "target_modules": "all-linear"})
        'lora-r16-target_modules-all-linear'
    """
    parts = [name]
    for key, value in settings.items():
        text = re.sub(r"[^A-Za-z0-9._+]+", "-", str(value)).strip("-") or "none"
        parts.append(f"{key}{'' if text[0].isdigit() else '-'}{text}")
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join(parts))
    if len(slug) > LONGEST:
        raise ConfigError(
            f"`{slug}` is too long for a name", where="methods", hint="give it a label: {label: large, name: ..., ...}"
        )
    return slug


def parse_seeds(seeds: Sequence[int] | int | str) -> list[int]:
    """Parse seeds: `[0, 1, 2]`, `3` (one seed, the number 3) or `"0,1,2"`.

    Raises:
        ConfigError: There is no seed, one is given twice, or one is not a seed.
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
            raise ConfigError(f"{part!r:.40} is no seed", where="seeds", hint="whole numbers from 0 on: seeds=0,1,2")
        if seed in found:
            raise ConfigError(
                f"seed {seed} is given twice: the same run again would only look like evidence", where="seeds"
            )
        found.append(seed)
    if not found:
        raise ConfigError("no seeds are given", where="seeds", hint="seeds=0,1,2")
    return found
