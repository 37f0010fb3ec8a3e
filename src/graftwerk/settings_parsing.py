"""Settings out of plain values: parsing, the spellings of a key, and faults in the user's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.other_names import lead
from graftwerk.settings import Settings

Model = TypeVar("Model", bound=Settings)


def parse_settings(model: type[Model], values: Mapping[str, Any], *, what: str, where: str) -> Model:
    """Parse the settings of a method or a task in a run file.

    Args:
        model: Class of the settings.
        values: The values by key.
        what: Name for messages: "method `lora`".
        where: The key of the run file.

    Raises:
        ConfigError: A key is unknown (the message names the nearest) or a value wrong.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = describe_faults(error, lambda place: known_keys(model) if not place else set(), of=what, within=where)
        has = f"it has: {', '.join(model.model_fields)}" if model.model_fields else "it has no settings"
        raise ConfigError("; ".join(lines), where=where, hint=has) from None


_KINDS = frozenset({"int", "float", "str", "bool", "none", "nullable"})
"""Names that pydantic gives to some kinds of value."""


def describe_faults(
    error: ValidationError,
    keys_at: Callable[[tuple[int | str, ...]], set[str]],
    *,
    of: str = "",
    within: str = "",
    homes: Mapping[str, str] | None = None,
) -> list[str]:
    """Return what is wrong with each key, in the user's words.

    Args:
        error: pydantic's error.
        keys_at: Function from the place of some settings to the keys they have, for the nearest right one.
        of: Name of what the settings belong to, for instance a method; nothing for a run file.
        within: Dotted key of these settings in a run file, if they are a part of one.
        homes: Dotted key of each key that may have been given in the wrong place.

    Returns:
        Parts of a message.
    """
    lines = []
    choices: dict[tuple[str, str], list[str]] = {}
    named = f" of {of}" if of else ""
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"] if not _is_tag(part))
        if fault["type"] == "extra_forbidden":
            *parents, last = map(str, fault["loc"])
            key = ".".join([*(part for part in parents if not _is_tag(part)), last])
            known = sorted(keys_at(fault["loc"][:-1]))
            if last in known and (of or parents):
                lines.append(f"`{key}`{named} is another spelling of a key that is given too; keep one of them")
                continue
            unknown = f"{of} has no setting `{key}`" if of else f"unknown key `{key}`"
            home = lead(last, ".".join(filter(None, [within, *parents])), known, homes or {})
            lines.append("; ".join(filter(None, [unknown, home or did_you_mean(last, known)])))
        elif fault["type"] == "missing":
            lines.append(f"`{key}`{named} is missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            got = f"{fault.get('input')!r:.80}"
            # What may be one of several kinds is said once, with what each kind wants.
            said = choices.setdefault((key, got), [])
            if message not in said:
                said.append(message)
    lines += [
        f"`{key}`{named}: {', or: '.join(said)} (got {got})" if key else "; ".join(said)
        for (key, got), said in choices.items()
    ]
    return list(dict.fromkeys(lines))


def _is_tag(part: Any) -> bool:
    """Return True if a part of a place is pydantic's name for one of the kinds that a value may be of, and no key."""
    return isinstance(part, str) and (part in _KINDS or not part.replace("_", "").replace("-", "").isalnum() or
                                      part.startswith(("constrained-", "function-")))  # fmt: skip


def parse_choice(
    value: Any,
    root: type[Any],
    choices: Mapping[str, type[Model]],
    *,
    what: str,
    where: str,
    shorthands: Mapping[str, Mapping[str, Any]] | None = None,
    also_called: Mapping[str, str] | None = None,
) -> Model:
    """Parse a value of a run file that is a name, or settings with `name`: a method, a task, an augmenter.

    Args:
        value: A name, a mapping with `name`, or an instance of ``root``.
        root: Base class of the choices; an instance of it is returned as it is.
        choices: Classes by name.
        what: Name for messages, with its article: "a method".
        where: The key of the run file.
        shorthands: Common names of a choice with some setting (DoRA): its `name` and that setting.
        also_called: Choices by other names that people use, perhaps with `: ` and words to add; a message leads from
            these names to the choice.

    Raises:
        ConfigError: There is no such choice or setting; the message names the nearest.
    """
    if isinstance(value, root):
        built: Model = value
        return built
    if isinstance(value, str):
        value = {"name": value}
    shorthands = shorthands or {}
    listed = f"There are: {', '.join([*choices, *shorthands])}"
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{what} is a name or a mapping with `name`, not {value!r:.80}", where=where, hint=listed)
    kind = what.partition(" ")[2]
    values = dict(value)
    name = str(values.pop("name"))
    if name in shorthands:
        values = {**shorthands[name], **values}
        name = str(values.pop("name"))
    if name not in choices:
        known, _, words = (also_called or {}).get(name.casefold().replace(" ", "-"), "").partition(": ")
        meant = f"did you mean `{known}`? {words}{'. ' if words else ''}{listed}"
        hint = meant if known else did_you_mean(name, [*choices, *shorthands], listed)
        raise ConfigError(f"there is no {kind} `{name}`", where=where, hint=hint)
    return parse_settings(choices[name], values, what=f"{kind} `{name}`", where=where)


def known_keys(model: type[Settings]) -> set[str]:
    """Return the field names and their accepted other spellings."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        choices = getattr(field.validation_alias, "choices", ())
        keys.update(choice for choice in choices if isinstance(choice, str))
    return keys


def spellings(model: type[Settings], key: str) -> set[str]:
    """Return all spellings of the key with this spelling, empty if there is no such key."""
    for name, field in model.model_fields.items():
        found = {name, *(it for it in getattr(field.validation_alias, "choices", ()) if isinstance(it, str))}
        if key in found:
            return found
    return set()
