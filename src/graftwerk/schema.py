"""The JSON schema of the run file, made from the settings models; editors check and complete run files with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from graftwerk.augmentation.settings import AUGMENTERS, Translator
from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.methods.base import Method
from graftwerk.methods.registry import METHODS, SHORTHANDS
from graftwerk.models.quantization import Quantization
from graftwerk.other_names import lead
from graftwerk.settings import Settings
from graftwerk.settings_parsing import known_keys
from graftwerk.tasks.base import Task
from graftwerk.tasks.registry import TASKS

CHOICES: dict[str, Mapping[str, type[Settings]]] = {"method": METHODS, "task": TASKS}
"""Keys of a run file whose value is a name, or the settings of what has that name."""
AUGMENT = "data.augment"
"""The key whose value is a list of such."""
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization.model_fields["name"].annotation)
NAMED_KINDS = {
    **{key: key for key in CHOICES},
    AUGMENT: "list of augmenters",
    "quantization": " | ".join((*QUANTIZATIONS, "mapping", "null")),
}
"""Names of the values of keys, as `graftwerk schema` shows them."""


def run_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a run file, with every method's settings and all accepted spellings."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    for key, choices, shorthands in (("method", METHODS, SHORTHANDS), ("task", TASKS, {})):
        definitions.pop(key.capitalize(), None)
        for choice in choices.values():
            definitions[choice.__name__] = _choice_schema(choice, key, choices, shorthands)
        schema["properties"][key] = {
            "description": RunConfig.model_fields[key].description,
            "oneOf": [
                {"enum": [*choices, *shorthands]},
                *({"$ref": f"#/$defs/{choice.__name__}"} for choice in choices.values()),
            ],
        }
    schema["properties"]["quantization"]["anyOf"].insert(0, {"enum": list(QUANTIZATIONS)})
    definitions.pop("Augmenter", None)
    for augmenter in AUGMENTERS.values():
        definitions[augmenter.__name__] = _choice_schema(augmenter, "augmenter", AUGMENTERS, {})
    listed = {"oneOf": [{"enum": [*AUGMENTERS]}, *({"$ref": f"#/$defs/{it.__name__}"} for it in AUGMENTERS.values())]}
    augment = definitions["DataSettings"]["properties"]["augment"]
    augment["anyOf"] = [{"type": "array", "items": listed}, *listed["oneOf"]]
    for key in ("type", "items"):
        augment.pop(key, None)
    definitions["Translator"] = {"additionalProperties": False, **Translator.model_json_schema()}
    _add_aliases(RunConfig, schema)
    for model in _parts(RunConfig):
        _add_aliases(model, definitions[model.__name__])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def run_keys() -> Iterator[dict[str, Any]]:
    """Yield every key of a run file with its kind, default and meaning.

    Keys of methods are written as ``method(lora).r``, keys of tasks and augmenters likewise.
    """
    yield from _keys(RunConfig, "")
    for key, choices in CHOICES.items():
        for name, model in choices.items():
            yield from _keys(model, f"{key}({name}).")
    for name, augmenter in AUGMENTERS.items():
        yield from _keys(augmenter, f"{AUGMENT}({name}).")


def keys_below(prefix: str) -> list[dict[str, Any]]:
    """Return the keys below a key, or that begin like it.

    Args:
        prefix: ``data``, ``training.save``, ``method.lora``, ``lora``, ``lora.r``, or ``method.r`` for every method's.

    Raises:
        ConfigError: There are none.

    Example:
        >>> [key["key"] for key in keys_below("training.adam_b")]
        ['training.adam_beta1', 'training.adam_beta2']
    """
    wanted = prefix.strip().strip(".").replace("(", ".").replace(")", "")
    keys = list(run_keys())
    forms = ((r"\((.*?)\)", r".\1"), (r"\(.*?\)", ""), (r".*\((.*?)\)", r"\1"))
    spelled = [(key, [re.sub(form, written, key["key"]) for form, written in forms]) for key in keys]
    below = [key for key, names in spelled if any(f"{name}.".startswith(f"{wanted}.") for name in names)]
    found = below or [key for key, names in spelled if any(name.startswith(wanted) for name in names)]
    if not found or not wanted:
        parent, _, last = wanted.rpartition(".")
        known = {part for _, names in spelled for name in names for part in (name, *name.split("."))}
        tops = ", ".join(f"`{name}`" for name in RunConfig.model_fields)
        hint = lead(last, parent, ()) or did_you_mean(wanted, sorted(known))
        raise ConfigError(f"no key begins with `{prefix}`", hint="; ".join(filter(None, [hint, f"there are: {tops}"])))
    return found


def _choice_schema(
    model: type[Settings],
    key: str,
    choices: Mapping[str, type[Settings]],
    shorthands: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    name = next(known for known, value in choices.items() if value is model)
    schema = model.model_json_schema()
    schema.pop("$defs", None)
    names = [name, *(short for short, values in shorthands.items() if values["name"] == name)]
    schema["properties"] = {"name": {"enum": names, "description": f"which {key}"}, **schema.get("properties", {})}
    schema["required"] = ["name", *schema.get("required", [])]
    _add_aliases(model, schema)
    return schema


def _add_aliases(model: type[Settings], schema: dict[str, Any]) -> None:
    """Add the other spellings of keys to a schema, since all of them are accepted.

    The schema that pydantic makes names only the first.
    """
    properties = schema["properties"]
    for name in model.model_fields:
        for other in sorted(_spellings(model, name) - {name}):
            properties[other] = {**properties[name], "description": f"the same as `{name}`"}


def _spellings(model: type[Settings], name: str) -> set[str]:
    choices = getattr(model.model_fields[name].validation_alias, "choices", ())
    return {name, *(choice for choice in choices if choice in known_keys(model))}


def _parts(model: type[Settings]) -> Iterator[type[Settings]]:
    for field in model.model_fields.values():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Settings) and annotation not in (Method, Task):
            yield annotation


def _keys(model: type[BaseModel], prefix: str) -> Iterator[dict[str, Any]]:
    described = model.model_json_schema()
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Settings) and annotation not in (Method, Task):
            yield from _keys(annotation, f"{prefix}{name}.")
            continue
        properties = described["properties"][name]
        yield {
            "key": prefix + name,
            "kind": NAMED_KINDS.get(prefix + name) or _kind(properties),
            "required": field.is_required(),
            "default": properties.get("default"),
            "meaning": field.description or "",
        }
        if annotation == Quantization | None:
            for key in _keys(Quantization, f"{prefix}{name}."):
                yield {**key, "required": False}  # the whole may be left out


def _kind(schema: dict[str, Any]) -> str:
    """Return the type of a key in a few words: `number > 0`, `text`, `linear | cosine | constant`."""
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_kind(option) for option in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}
    words = names.get(str(kind), "mapping")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return " ".join([words, *limits])
