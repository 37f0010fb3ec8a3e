"""JSON of foreign files, parsed within limits and without the parser's leniency; and how a foreign file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from graftwerk.errors import IntegrityError

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 12
MAX_JSON_VALUES = 100_000
MAX_ESCAPES = 10_000


def refuse(
    path: Path, why: str, mend: str = "download or save it again; if it came from somebody else, do not trust it"
) -> NoReturn:
    raise IntegrityError(f"{path.name} was refused: {why}", where=str(path), mend=mend)


def parse_json(content: bytes, path: Path) -> Any:
    """What a text says, if it says it in UTF-8, with every key once and numbers of a sane length.

    Raises:
        IntegrityError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(path, f"it has the key {twice!a:.80} twice")
        return values

    def constant(text: str) -> NoReturn:
        refuse(path, f"it holds {text}, which is no number of JSON")

    def whole(digits: str) -> int:
        if len(digits) > 20:  # 2**64 has 20; the time to read a number grows with the square of its length
            refuse(path, f"it holds a number of {len(digits):,} digits")
        return int(digits)

    if content.count(b"\\") > MAX_ESCAPES:
        refuse(path, f"it holds more than {MAX_ESCAPES:,} escape sequences")
    try:
        return json.loads(content.decode(), object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
    except UnicodeDecodeError:
        refuse(path, "it is not UTF-8")
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is not valid JSON ({str(error)[:80]})")


def check_depth(values: Any, path: Path) -> None:
    """Refuses what is nested deeper than `MAX_JSON_DEPTH`."""
    level = [values]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[Any] = []
        for value in level:
            if type(value) is dict:
                inner.extend(value.values())
            elif type(value) is list:
                inner.extend(value)
        level = inner
    if any(type(value) in (dict, list) for value in level):
        refuse(path, f"it is nested deeper than {MAX_JSON_DEPTH} levels")
