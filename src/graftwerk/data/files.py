"""Files of rows: csv, tsv, jsonl, json, parquet. Every row keeps its line; what cannot be read is kept as a bad row.

Text is UTF-8, with or without a byte order mark. A file with a few wrong bytes is still read: the rows that hold them
are bad rows, the others are good.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftwerk.data.rows import BadRow, Table
from graftwerk.errors import ConfigError, DataError, EnvironmentFault

MAX_FIELD_CHARACTERS = 1 << 27
"""The csv module's own limit (131,072) is below a long document."""


def read_file(path: Path, source: str) -> Table:
    """All rows of a file, by its ending.

    Raises:
        ConfigError: an ending that is not read here.
        DataError: the file as a whole cannot be read (UTF-16, no header, not parquet).
        EnvironmentFault: missing permission, or a package that reads this kind of file is not installed.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        kind = "a folder" if path.is_dir() else f"a file that ends in `{path.suffix}`"
        raise ConfigError(f"{path} is {kind}", mend=f"rows are read from {', '.join(READERS)}", where=source)
    table = Table(source, str(path), [], [])
    try:
        reader(path, table)
    except PermissionError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows) + len(table.bad)
    return table


def _text(path: Path) -> tuple[str, bool]:
    """The file as text, and whether some of it is not UTF-8 (those bytes become lone surrogates, U+DC80 and up)."""
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("the file is UTF-16, not UTF-8", where=f"{path}:1", mend="save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="surrogateescape"), True


def _bad_characters(text: str) -> str | None:
    """What is wrong with the characters of a row, if anything is."""
    if "\0" in text:
        return "holds a NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not UTF-8 (byte 0x{ord(text[error.start]) - 0xDC00:02x})"
    return None


# csv and tsv


def _read_delimited(path: Path, table: Table, delimiter: str) -> None:
    text, damaged = _text(path)
    suspicious = damaged or "\0" in text
    records = _records(text, delimiter, table)
    header: list[str] | None = None
    for line, cells in records:
        if not cells:  # an empty line
            continue
        reason = next(filter(None, map(_bad_characters, cells)), None) if suspicious else None
        if header is None:
            header = _header(cells, reason, f"{path}:{line}")
            table.columns = tuple(header)
        elif reason is not None:
            table.bad.append(BadRow(line, reason))
        elif len(cells) != len(header):
            table.bad.append(BadRow(line, f"has {len(cells)} fields where the header has {len(header)}"))
        else:
            table.rows.append(dict(zip(header, cells, strict=True)))
            table.lines.append(line)
    if header is None:
        raise DataError("the file is empty: not even a header", where=str(path))


def _header(cells: list[str], reason: str | None, where: str) -> list[str]:
    if reason is not None:
        raise DataError(f"the header {reason}", where=where)
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the header has the column `{twice[0]}` more than once", where=where)
    return names


def _records(text: str, delimiter: str, table: Table) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each record. After broken quoting, reading goes on in the line after its first."""
    lines = io.StringIO(text, newline="").readlines()
    before = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # one setting for the whole process: put back below
    try:
        start = 0
        while start < len(lines):
            reader = csv.reader(itertools.islice(lines, start, None), delimiter=delimiter, strict=True)
            first = start + 1
            try:
                for cells in reader:
                    yield first, cells
                    first = start + reader.line_num + 1
                return
            except csv.Error as error:
                table.bad.append(BadRow(first, f"broken quoting ({error})"))
                start = first
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, table: Table) -> None:
    _read_delimited(path, table, ",")


def _read_tsv(path: Path, table: Table) -> None:
    _read_delimited(path, table, "\t")


# json


def _read_jsonl(path: Path, table: Table) -> None:
    text, damaged = _text(path)
    suspicious = damaged or "\0" in text
    columns: dict[str, None] = {}
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw or raw.isspace():
            continue
        reason = _bad_characters(raw) if suspicious else None
        row: Any = None
        if reason is None:
            row, reason = _object(raw)
        if reason is None:
            columns.update(dict.fromkeys(row))
            table.rows.append(row)
            table.lines.append(line)
        else:
            table.bad.append(BadRow(line, reason))
    table.columns = tuple(columns)


def _object(raw: str) -> tuple[Any, str | None]:
    """The JSON object in ``raw``, or what is wrong with it."""
    try:
        value = _DECODER.decode(raw)
    except json.JSONDecodeError as error:
        return None, f"broken JSON ({error.msg}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"broken JSON ({error})"
    return (value, None) if isinstance(value, dict) else (None, f"is {_json_kind(value)}, not an object")


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` more than once")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _read_json(path: Path, table: Table) -> None:
    """A JSON list of objects, read item by item, so that each keeps its line."""
    text, damaged = _text(path)
    suspicious = damaged or "\0" in text
    columns: dict[str, None] = {}
    position, line, counted = _skip_space(text, 0), 1, 0
    if text[position : position + 1] != "[":
        raise DataError(
            "a .json file of rows is a list of objects", where=f"{path}:1", mend="one object a line is .jsonl"
        )
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = _DECODER.raw_decode(text, position)
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError("a comma or the end of the list is missing after this item")
        except (ValueError, RecursionError, StopIteration) as error:
            # Where one item ends and the next begins is unknown from here on, so nothing after it can be saved.
            raise DataError(
                f"broken JSON: {error}", where=f"{path}:{line}", mend="mend it, or write one object a line (.jsonl)"
            ) from None
        reason = _bad_characters(text[position:end]) if suspicious else None
        if reason is None and not isinstance(row, dict):
            reason = f"is {_json_kind(row)}, not an object"
        if reason is None:
            columns.update(dict.fromkeys(row))
            table.rows.append(row)
            table.lines.append(line)
        else:
            table.bad.append(BadRow(line, reason))
        position = after
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    if text[position + 1 :].strip():
        raise DataError("there is something after the end of the list", where=str(path))
    table.columns = tuple(columns)


def _skip_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


# parquet


def _read_parquet(path: Path, table: Table) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EnvironmentFault(
            "reading parquet needs the package pyarrow", where=str(path), mend="pip install 'graftwerk[data]'"
        ) from None
    try:
        content = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(f"not a readable parquet file: {str(error).splitlines()[0]}", where=str(path)) from None
    names = content.column_names
    if len(set(names)) != len(names):
        raise DataError("two columns have the same name", where=str(path), mend=f"columns: {', '.join(names)}")
    table.rows = content.to_pylist()
    table.lines = list(range(1, len(table.rows) + 1))
    table.columns = tuple(names)
    table.unit = "row"


READERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""What each ending is read by: the only list of formats."""
