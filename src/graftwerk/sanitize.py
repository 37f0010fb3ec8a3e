"""Clean everything that is printed or written, in one place: no secret in it, and nothing that drives a terminal.

A run file may name a place by a path or URL with a token in it, and names and texts of foreign files may hold escape
sequences. Errors, logs, tables, manifests, reports and model cards take their text through `clean`; the values that a
run works with are never changed.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

REDACTED = "[redacted]"
_KEYS = r"token|password|passwd|pwd|secret|api[_-]?key|access[_-]?key|authorization|signature|credential"
_QUERY = rf"{_KEYS}|key|sig|auth|jwt|code|pass|policy|session|x-(?:amz|goog)-[\w-]+|(?:aws|google)access(?:key)?id"
_SECRETS = re.compile(
    # user:password@ or token@ of a URL; after one slash, too, as pathlib writes it
    r"(?P<url>(?<=[a-z0-9]:)/{1,2})(?!\[redacted\]@)[^/\s@]+(?=@)"
    rf"|(?P<query>[?&;#][\w.-]{{0,40}}?(?:{_QUERY})=)[^&;#\s'\"]+"
    r"|(?P<bearer>\b(?:bearer|authorization\s*[=:]\s*(?:bearer|basic))\s+)[\w.~+/=-]{6,}"
    rf"|(?P<key>(?<![a-z0-9])(?:{_KEYS})=)[^\s&;/'\"]+"
    r"|(?P<colon>(?<![a-z0-9])(?:password|passwd|secret|api[_-]?key|authorization)\s*:\s*)"
    r"(?!bearer|basic)[^\s,'\"]+"
    r"|\b(?:hf_(?:[a-z0-9]{20,}|(?-i:(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{10,}))"
    r"|sk-[\w-]{20,}|glpat-[\w-]{16,}|(?:gh[opsur]|github_pat|npm|pypi)[_-][\w-]{16,}|xox[abeprs]-[a-z0-9-]{10,}"
    r"|(?-i:A[KS]IA[0-9A-Z]{16})|(?-i:AIza[\w-]{30,})|(?-i:(?<!-)eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*))",
    re.IGNORECASE | re.ASCII,
)
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
"""Control characters, with which a terminal is driven; marks that turn the direction of text, with which a name passes
for another; line separators; halves of surrogate pairs, which no stream can encode; tags, which nobody sees."""


def redact(text: str) -> str:
    """Replace what looks like a secret by `REDACTED`: credentials of URLs, signed queries, tokens by their shapes."""

    def hidden(match: re.Match[str]) -> str:
        return next((part for part in match.groups() if part), "") + REDACTED

    return _SECRETS.sub(hidden, text)


def visible(text: str) -> str:
    """Replace each character that is not seen but acts by U+FFFD. Newlines and tabs stay."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


def clean(text: str) -> str:
    """Return a text that is safe to show: `redact` and `visible`. It is idempotent."""
    return redact(visible(text))


def printable(text: str) -> str:
    """Return a text without characters that move the cursor, colour the terminal or reverse the line."""
    line = " ".join(visible(text).split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def strings_in(tree: Any) -> Iterator[str]:
    """Yield every text in a tree of mappings and lists; keys of mappings are left out."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from strings_in(inner)


def redacted(value: Any) -> Any:
    """Return a value with every text in it redacted; keys of mappings stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return value


def dump_json(value: Any, **options: Any) -> str:
    r"""Dump as `json.dumps` does, characters that act written as ``\uXXXX``: whoever parses it gets them back."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return re.sub(rf"(?![\n\t]){_UNSEEN.pattern}", lambda match: json.dumps(match.group())[1:-1], text)


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: dates as ISO 8601, bytes as base64, no NaN, numpy's numbers and arrays as ours."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Sequence | set | frozenset):
        return [as_json(inner) for inner in value]
    return as_json(value.tolist()) if hasattr(value, "tolist") else str(value)
