"""Formats of rows: instruction/input/output, chat, prompt/completion, or plain text.

Recognised by the columns, or named in `data.format`. Every format becomes ``{"turns": [[role, content], ...]}`` with
the roles system, user and assistant, and the last turn is the assistant's; plain text stays ``{"text": ...}``. A row
that cannot be converted is a bad row, reported with its place.

| format | columns | a turn |
|---|---|---|
| instruction | `instruction`, `output`, and `input` where there is one | `input` after an empty line |
| chat | `messages` or `conversations` | `{role, content}` or `{from, value}`; human is user, gpt is assistant |
| prompt-completion | `prompt`, `completion` | |
| text | `text` | |

All but plain text may have a column `system` too: the system message of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwerk.data.fields import Part, text_part
from graftwerk.errors import ConfigError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CALLS = ("tool_calls", "function_call")
"""What an assistant's message can say beside its content; nothing here could train it."""

Turns = list[list[str]]
Shape = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """One form of rows.

    Attributes:
        parts, optional, answers: As for `data.reading.RowFormat`.
        shape: From the parts of a row to its normal form.
        ask: The same for a row that a model is asked about, whose answer is left out.
    """

    parts: Mapping[str, Part]
    shape: Shape
    ask: Shape
    answers: tuple[str, ...] = ()
    optional: Mapping[str, Part] = field(default_factory=dict)


def perhaps_text(value: Any) -> str:
    """Return a text, or "" if there is none."""
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_part(value)


def messages_part(value: Any) -> Turns:
    """Return the messages of a conversation as turns, without an empty system message.

    Raises:
        ValueError: no list of messages, an unknown role, an empty message, a system message that is not the first.
    """
    if not isinstance(value, list):
        raise ValueError("is missing" if value is None else "is no list of messages")
    turns: Turns = []
    for number, message in enumerate(value, start=1):
        try:
            role, content = _message(message)
        except ValueError as error:
            raise ValueError(f"has a message {number} that {error}") from None
        if role == "system" and not content:
            continue
        if role == "system" and turns:
            raise ValueError(f"has a system message as message {number}; only the first can be one")
        turns.append([role, content])
    if not turns:
        raise ValueError("has no messages")
    return turns


def unused_keys(messages: Any) -> set[str]:
    """Return the keys of a row's messages that say something and are not read: `weight`, `name`, ..."""
    found: set[str] = set()
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping):
            read = ("from", "value") if "from" in message else ("role", "content")
            found |= {str(key) for key, value in message.items() if key not in (*read, *CALLS) and says(value)}
    return found


def says(value: Any) -> bool:
    """Return whether a cell holds anything."""
    return not (value is None or value != value or (isinstance(value, str | list | dict) and not value))


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError("is not an object")
    keys = ("from", "value") if "from" in message else ("role", "content")
    for key in keys:
        if key not in message:
            raise ValueError(f"has no `{key}`")
    name, content = (message[key] for key in keys)
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"has the unknown role {name!r:.40}; there are: {', '.join(ROLES)}")
    role = ROLES[name]
    if called := next((key for key in CALLS if message.get(key)), None):
        raise ValueError(f"calls a tool (`{called}`), which cannot be trained")
    try:
        return role, perhaps_text(content) if role == "system" else text_part(content)
    except ValueError as error:
        raise ValueError(f"({role}) {error}") from None


def conversation(turns: Turns) -> dict[str, Any]:
    """Return a row of turns for training.

    Raises:
        ValueError: nothing is answered, or the last turn is not.
    """
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError("no turn is the assistant's, so there is nothing to learn")
    if turns[-1][0] != "assistant":
        raise ValueError(f"the last turn is the {turns[-1][0]}'s, and nobody answers it")
    return {"turns": turns}


def question(turns: Turns) -> dict[str, Any]:
    """Return a row of turns for prediction, without the answer that it may have already.

    Raises:
        ValueError: nothing is asked.
    """
    asked = turns[:-1] if turns[-1][0] == "assistant" else turns
    if not asked or asked[-1][0] != "user":
        raise ValueError("no turn of a user is there to be answered")
    return {"turns": asked}


def question_text(turns: Sequence[Sequence[str]]) -> str:
    """Return the contents before the last answer, joined into one text; it identifies a row."""
    before = turns[:-1] if turns[-1][0] == "assistant" else turns
    return "\n".join(content for _, content in before)


def _opened(row: dict[str, Any], turns: Turns) -> Turns:
    """Put the row's `system` in front of its turns.

    Raises:
        ValueError: they begin with another system message.
    """
    system = row.get("system", "")
    if not system or turns[0] == ["system", system]:
        return turns
    if turns[0][0] == "system":
        raise ValueError("has a `system` that differs from the system message of its conversation")
    return [["system", system], *turns]


def _instructed(row: dict[str, Any]) -> list[str]:
    return ["user", "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)]


def _chat(part: str) -> Format:
    return Format(
        {part: messages_part},
        shape=lambda row: conversation(_opened(row, row[part])),
        ask=lambda row: question(_opened(row, row[part])),
        optional=_SYSTEM,
    )


_SYSTEM: dict[str, Part] = {"system": perhaps_text}


_INSTRUCTION = Format(
    {"instruction": text_part, "output": text_part},
    shape=lambda row: conversation(_opened(row, [_instructed(row), ["assistant", row["output"]]])),
    ask=lambda row: question(_opened(row, [_instructed(row)])),
    answers=("output",),
    optional={"input": perhaps_text, **_SYSTEM},
)
_PROMPT = Format(
    {"prompt": text_part, "completion": text_part},
    shape=lambda row: conversation(_opened(row, [["user", row["prompt"]], ["assistant", row["completion"]]])),
    ask=lambda row: question(_opened(row, [["user", row["prompt"]]])),
    answers=("completion",),
    optional=_SYSTEM,
)
_TEXT = Format({"text": text_part}, shape=lambda row: row, ask=lambda row: row)

FORMATS: dict[str, tuple[Format, ...]] = {
    "instruction": (_INSTRUCTION,),
    "chat": (_chat("messages"), _chat("conversations")),
    "prompt-completion": (_PROMPT,),
    "text": (_TEXT,),
}
"""What each format's rows can look like: the only list of them."""


def columns_of_format(columns: Sequence[str], format: str | None) -> tuple[str, ...]:
    """Return the columns without those of other formats than the named one."""
    if format is None:
        return tuple(columns)
    own = {part for shape in FORMATS[format] for part in (*shape.parts, *shape.optional)}
    others = {part for shapes in FORMATS.values() for shape in shapes for part in (*shape.parts, *shape.optional)}
    return tuple(column for column in columns if column in own or column not in others)


def recognise(columns: Sequence[str], formats: Sequence[str]) -> tuple[str, Format]:
    """Recognise the format of rows by their columns.

    Args:
        columns: Column names, renamed by `data.columns`. Columns with answers may be missing, as they are in rows for
            prediction.
        formats: Names of the formats that the task reads.

    Returns:
        Name and format.

    Raises:
        ConfigError: No format fits, or more than one.
    """
    found = [
        (name, shape)
        for name in formats
        for shape in FORMATS[name]
        if all(part in columns for part in shape.parts if part not in shape.answers)
    ]
    whole = [(name, shape) for name, shape in found if all(part in columns for part in shape.parts)]
    found = whole or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(dict.fromkeys(name for name, _ in found))
        raise ConfigError(
            f"the columns could be those of several formats: {names}",
            where="data.format",
            hint=f"name one: data.format={found[0][0]}"
            if len({name for name, _ in found}) > 1
            else "a source has `messages` or `conversations`, not both; data.columns: {messages: ...} chooses one",
        )
    wanted = "; ".join(
        f"{name}: " + " or ".join(" and ".join(f"`{part}`" for part in shape.parts) for shape in FORMATS[name])
        for name in formats
    )
    raise ConfigError(
        f"the columns ({', '.join(columns) or 'none'}) are those of no format that this task reads",
        where="data.columns",
        hint=f"rename columns with `data.columns` to those of one of them. {wanted}",
    )
