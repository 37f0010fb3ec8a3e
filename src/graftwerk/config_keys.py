"""The keys of a run file: overrides parsed and applied, keys completed, wrong ones explained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.methods.registry import METHODS, SHORTHANDS
from graftwerk.settings import Settings
from graftwerk.settings_parsing import describe_faults, known_keys, spellings
from graftwerk.tasks.registry import TASKS
from graftwerk.training.settings import TrainingSettings
from graftwerk.yaml_files import parse_override_value

Parts = tuple[tuple[str, type[Settings]], ...]
IMPLIED: Parts = (("training", TrainingSettings), ("data", DataSettings))
"""The parts of a run file whose keys may be given without the part's name; no other key has one of these names."""


def parse_overrides(overrides: list[str] | dict[str, Any] | None) -> dict[str, Any]:
    """Parse overrides of a run file.

    Args:
        overrides: ``["training.seed=1"]``, each value YAML; or a mapping, which is returned as it is; or None.

    Returns:
        Values by dotted key.

    Raises:
        ConfigError: An item is not of the form key=value, its value is not YAML, or two items set the same key.
    """
    if overrides is None:
        return {}
    if isinstance(overrides, dict):
        return overrides
    parsed = {}
    seen: dict[tuple[str, ...], str] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{item}` is not of the form key=value", hint="for instance training.seed=1")
        try:
            parsed_value = parse_override_value(value, key)
        except ConfigError as error:
            raise ConfigError(f"the value of `{key}` is not YAML: {value[:200]} ({error.what[:200]})") from None
        keys = tuple(full_key(key.strip()))
        if keys in seen:
            raise ConfigError(f"`{seen[keys]}` and `{item}` both set `{'.'.join(keys)}`", hint="give one of them")
        seen[keys] = item
        parsed[key.strip()] = parsed_value
    return parsed


def full_key(dotted: str) -> list[str]:
    """Split a dotted key and complete it: `learning_rate` means `training.learning_rate`."""
    keys = dotted.split(".")
    if len(keys) == 1:
        part = next((part for part, model in IMPLIED if keys[0] in known_keys(model)), None)
        return keys if part is None else [part, *keys]
    return keys


def apply_override(tree: dict[str, Any], dotted: str, value: Any, root: type[Settings]) -> None:
    """Set one key in the content of a run file, in place; an earlier value goes, however it was spelled.

    Args:
        tree: The content.
        dotted: The key.
        value: Its value.
        root: Settings of a whole run.

    Raises:
        ConfigError: A part of the key has no keys of its own.
    """
    *parents, last = full_key(dotted)
    node = tree
    for key in parents:
        child = node.get(key)
        if key in ("method", "task", "quantization") and isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"`{key}` has no keys of its own, so `{dotted}` cannot be set", where=dotted)
        node[key] = child
        node = child
    model = _settings_at(parents, tree, root)
    for spelling in spellings(model, last) if model is not None else ():
        node.pop(spelling, None)  # in place of what the file says, however it is spelled there
    node[last] = value


def _settings_at(keys: Iterable[Any], tree: Any, root: type[Settings]) -> type[Settings] | None:
    """Return the settings class at some keys of a run file, or None if those keys hold no settings.

    Args:
        keys: The keys, outermost first.
        tree: Content of the run file, whose `name` tells which method or task has the settings.
        root: Settings of a whole run.
    """
    model = root
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        found: Any = None
        if model is root and key in ("method", "task"):
            name = str(tree.get("name")) if isinstance(tree, Mapping) else str(tree)
            found = TASKS.get(name) if key == "task" else METHODS.get(str(SHORTHANDS.get(name, {"name": name})["name"]))
        elif (field := model.model_fields.get(key)) is not None:
            found = next((part for part in get_args(field.annotation) if part is not NoneType), field.annotation)
        if not (isinstance(found, type) and issubclass(found, Settings)):
            return None
        model = found
    return model


def to_config_error(
    error: ValidationError, tree: Mapping[str, Any], where: str | None, root: type[Settings]
) -> ConfigError:
    """Convert a pydantic error: each key, what is wrong with it, and the nearest valid one.

    Args:
        error: The error.
        tree: Content of the run file.
        where: The run file, for the message.
        root: Settings of a whole run.
    """

    def keys_at(keys: tuple[int | str, ...]) -> set[str]:
        if not keys:
            return known_keys(root).union(*(known_keys(model) for _, model in IMPLIED))
        model = _settings_at(keys, tree, root)
        return known_keys(model) if model is not None else set()

    parts: Parts = (("evaluation", EvaluationSettings), *reversed(IMPLIED))  # the last one with a key names its home
    homes = {key: f"{part}.{key}" for part, model in parts for key in known_keys(model)}
    lines = describe_faults(error, keys_at, homes=homes)
    return ConfigError("; ".join(lines), where=where, hint="`graftwerk schema` lists every key with its meaning")
