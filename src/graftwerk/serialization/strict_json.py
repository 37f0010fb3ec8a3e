"""JSON of foreign files, parsed within limits and without the parser's leniency, and how a foreign file is refused.

Our own JSON files are written here too, sealed, so that they can be read again and a change is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.sanitize import dump_json

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 12
MAX_JSON_VALUES = 100_000
MAX_ESCAPES = 10_000
SEAL = "digest"
"""Key of our own files under which the SHA-256 of everything else in them stands."""


def refuse(
    path: Path, why: str, hint: str = "download or save it again; if it came from somebody else, do not trust it"
) -> NoReturn:
    """Refuse an untrusted file.

    Raises:
        IntegrityError: Always, with the reason.
    """
    raise IntegrityError(f"{path.name} was refused: {why}", where=str(path), hint=hint)


def parse_json(content: bytes, path: Path, scale: float = 1.0) -> Any:
    """Parse JSON strictly: UTF-8, no key twice, no lone surrogates, finite numbers that fit into 64 bits.

    Args:
        content: The bytes of the file.
        path: The file, for messages.
        scale: Factor on the usual limits.

    Raises:
        IntegrityError: The text is anything else.
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
        if not -(2**63) <= (number := int(digits)) < 2**64:
            refuse(path, f"it holds {digits}, which does not fit into 64 bits")
        return number

    def fraction(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            refuse(path, f"it holds {digits[:40]}, which is beyond all numbers of 64 bits")
        return number

    if content.count(b"\\") > scale * MAX_ESCAPES:
        refuse(path, f"it holds more than {MAX_ESCAPES:,} escape sequences")
    try:
        values = json.loads(
            content.decode(),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=whole,
            parse_float=fraction,
        )
        if b"\\u" in content and not _is_text(values):
            refuse(path, "it holds half a character (a lone surrogate)")
        return values
    except UnicodeDecodeError:
        refuse(path, "it is not UTF-8")
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is not valid JSON ({str(error)[:80]})")


def _is_text(values: Any) -> bool:
    """Return True if no text in a value holds a lone surrogate."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(content: bytes, path: Path, scale: float = 1.0) -> dict[str, Any]:
    """Parse a JSON object within every limit of `read_json`.

    Args:
        content: The bytes of the file.
        path: The file, for messages.
        scale: Factor on the usual limits of bytes, values and escapes.

    Raises:
        IntegrityError: It is not a JSON object, or exceeds a limit.
    """
    if len(content) > scale * MAX_JSON_BYTES:
        refuse(path, f"it is larger than {int(scale * MAX_JSON_BYTES):,} bytes")
    if sum(content.count(sign) for sign in (b"{", b"[", b",")) > max(scale, 1) * MAX_JSON_VALUES:
        refuse(path, f"it holds more than {MAX_JSON_VALUES:,} values")
    values = parse_json(content, path, max(scale, 1.0))
    if not isinstance(values, dict):
        refuse(path, "it holds no JSON object")
    check_depth(values, path)
    return values


def dump_object(
    values: Mapping[str, Any], path: Path, *, seal: bool = False, room: float = 1.0, indent: int | None = 1
) -> bytes:
    """Encode an object as JSON that `read_json` reads again.

    Args:
        values: Plain values; numbers must be finite.
        path: Where they are to be written, for messages.
        seal: Add a digest of all of it, by which `check_seal` sees whether anything was changed.
        room: Share of the reader's usual limit of bytes that they may take: less than one before more is added to them,
            more where the reader's ``scale`` is.
        indent: Spaces of each level; None for one line.

    Raises:
        ConfigError: they are no JSON, or the reader would refuse them.
    """
    try:
        values = {**values, SEAL: digest_of(values)} if seal else values
        content = (dump_json(values, indent=indent) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} cannot be written as JSON: {error}", where=str(path)) from None
    try:
        if len(content) > (most := int(room * MAX_JSON_BYTES)):
            refuse(path, f"it would take {len(content):,} bytes; at most {most:,} are there for it")
        parse_object(content, path, room)
    except IntegrityError as error:
        raise ConfigError(
            f"{path.name} could be written, but not be read again: {error.what.partition(': ')[2]}",
            where=str(path),
            hint="shorter or fewer labels, filters, sets, texts of the run file: they are stored with the run",
        ) from None
    return content


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an object's content, whatever its order of keys, white space and seal."""
    content = json.loads(json.dumps({key: value for key, value in values.items() if key != SEAL}))  # keys become texts
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def check_seal(values: Mapping[str, Any], path: Path) -> bool:
    """Check the digest that a file of ours holds of its own content.

    Returns:
        True if the digest is there and matches; False if the file, of an older version, has none.

    Raises:
        IntegrityError: The content was changed since it was written.
    """
    if SEAL not in values:
        return False
    if values[SEAL] != digest_of(values):
        raise IntegrityError(
            f"{path.name} is not what was written: it was damaged or changed",
            where=str(path),
            hint=f"take it from a copy; if it was changed on purpose, delete its key `{SEAL}`",
        )
    return True


def check_depth(values: Any, path: Path) -> None:
    """Raise IntegrityError for values nested deeper than `MAX_JSON_DEPTH`."""
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
