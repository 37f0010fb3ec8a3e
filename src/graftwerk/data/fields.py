"""Readers for the fields of a row: each returns the cleaned value, or raises a ValueError that says what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

Part = Callable[[Any], Any]
"""The clean value may be anything: text, or the messages of a conversation."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")


def text_part(value: Any) -> str:
    """Return a text unchanged, if it has at least one visible character.

    Raises:
        ValueError: It is missing, empty, not text, or holds a NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise ValueError("is missing" if _absent(value) else f"is {_kind(value)}, not text")
    if not value.strip():
        raise ValueError("is empty")
    _check_characters(value)
    return value


def label_part(value: Any) -> str:
    """Return a class name. Numbers become their shortest text, so that 1, 1.0 and "1" are one class.

    Raises:
        ValueError: It is missing, empty, or neither text nor number.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if not isinstance(value, str):
        several = " (several labels for a row: task=multilabel)" if isinstance(value, list | tuple) else ""
        raise ValueError("is missing" if _absent(value) else f"is {_kind(value)}, not a class{several}")
    name = value.strip()
    if not name:
        raise ValueError("is empty")
    _check_characters(name)
    return name


def number_part(value: Any) -> float:
    """Return a number, also one that is written as text.

    Raises:
        ValueError: It is missing, empty, infinite, or no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("is missing" if value is None else f"is {_kind(value)}, not a number")
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        comma = isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip())
        raise ValueError(f"is {value!r:.40}, not a number" + (": write it with a point" if comma else "")) from None
    if not math.isfinite(number):
        raise ValueError("is missing" if math.isnan(number) else "is infinite")
    return number


def labels_part(value: Any, separator: str = ",") -> list[str]:
    """Return label names without repeats: those of a list, of a JSON list in a text, or between separators.

    Args:
        value: The cell; an empty text or list means no labels.
        separator: What stands between the labels of a text.

    Raises:
        ValueError: It is missing, or a label is empty or neither text nor number.
    """
    if isinstance(value, str):
        text = value.strip()
        value = _json_list(text) if text.startswith("[") else [part for part in text.split(separator) if part.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError("is missing" if _absent(value) else f"is {_kind(value)}, not a list of labels")
    try:
        return list(dict.fromkeys(label_part(each) for each in value))
    except ValueError as error:
        raise ValueError(f"holds a label that {error}") from None


def words_part(value: Any) -> list[str]:
    """Return words or tags: those of a list, of a JSON list in a text, or between the blanks of a text.

    Raises:
        ValueError: It is missing, empty, or one is empty or no text.
    """
    if isinstance(value, str):
        value = _json_list(value) if value.lstrip().startswith("[") else value.split()
    if not isinstance(value, list | tuple):
        raise ValueError("is missing" if _absent(value) else f"is {_kind(value)}, not a list of words")
    if not value:
        raise ValueError("is empty")
    try:
        return [text_part(each) for each in value]
    except ValueError as error:
        raise ValueError(f"holds a word that {error}") from None


def texts_part(value: Any) -> list[str]:
    """Return the texts of a list, or one text as a list; nothing is an empty list.

    Raises:
        ValueError: A text is empty or none.
    """
    if _absent(value) or value == "":
        return []
    try:
        return [text_part(each) for each in (value if isinstance(value, list | tuple) else [value])]
    except ValueError as error:
        raise ValueError(f"holds a text that {error}") from None


def spans_part(value: Any) -> list[tuple[int, int, str]]:
    """Return spans of characters as (start, end, label), in order; also from a JSON list in a text.

    Args:
        value: A list of ``{"start", "end", "label"}`` or ``[start, end, label]``; an empty one means no spans.

    Raises:
        ValueError: It is missing, or a span is none.
    """
    if isinstance(value, str):
        value = _json_list(value) if value.strip() else []
    if not isinstance(value, list | tuple):
        raise ValueError("is missing" if _absent(value) else f"is {_kind(value)}, not a list of spans")
    spans = []
    for span in value:
        if isinstance(span, dict):
            span = [span.get(key) for key in ("start", "end", "label")]
        if not isinstance(span, list | tuple) or len(span) != 3 or not all(type(edge) is int for edge in span[:2]):
            raise ValueError(f"holds {span!r:.60}, which is no span: [start, end, label], in characters")
        spans.append((span[0], span[1], label_part(span[2])))
    return sorted(spans)


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError("begins like a JSON list and is none") from None


def _check_characters(text: str) -> None:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A JSON escape like "\ud800" alone: no character, and no tokenizer takes it.
        raise ValueError("holds half of a surrogate pair, which is no character") from None


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"the number {value}"
    for kind, name in ((list, "a list"), (dict, "an object"), (bytes, "bytes")):
        if isinstance(value, kind):
            return name
    return f"of type {type(value).__name__}"
