"""Files of rows: csv, tsv, jsonl, json, parquet, txt, compressed or not; folders and pairs of them.

Every row keeps its line; what cannot be read is kept as a bad row.

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

from graftwerk.data.compressed import OPENERS, plain_name, read_bytes
from graftwerk.data.rows import BadRow, Table, joined
from graftwerk.data.textfiles import TextRows, fill_text, pair_lines
from graftwerk.errors import ConfigError, DataError, EnvironmentFault

MAX_FIELD_CHARACTERS = 1 << 27
"""The csv module's own limit (131,072) is below a long document."""


def read_file(path: Path, source: str, text_rows: TextRows = "line") -> Table:
    """All rows of a file, by its ending, or of the files of a folder.

    Args:
        text_rows: What is a row of a .txt file.

    Raises:
        ConfigError: an ending that is not read here; a folder with files of several kinds, or of none.
        DataError: the file as a whole cannot be read (UTF-16, no header, not parquet).
        EnvironmentFault: missing permission, or a package that reads this kind of file is not installed.
        IntegrityError: a compressed file that is damaged, or expands beyond all proportion.
    """
    if path.is_dir():
        return _read_folder(path, source, text_rows)
    table = Table(source, str(path), [], [])
    try:
        ending = kind_of(path)
        reader = READERS.get(ending)
        if reader is None:
            raise ConfigError(
                f"{path} is a file that ends in `{ending}`",
                mend=f"rows are read from {', '.join(READERS)}, also with {', '.join(OPENERS)} behind it",
                where=source,
            )
        (_read_documents if reader is _read_text and text_rows == "document" else reader)(path, table)
    except PermissionError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows) + len(table.bad)
    return table


def read_pair(first: Path, second: Path, source: str) -> Table:
    """Rows with `source` and `target` from two files of text (whatever they end in), line by line.

    Raises:
        DataError: they have not the same number of lines.
        EnvironmentFault, IntegrityError: as for `read_file`.
    """
    table = Table(source, str(first), [], [])
    try:
        pair_lines((first, _text(first)[0]), (second, _text(second)[0]), table)
    except PermissionError as error:
        raise EnvironmentFault(f"{error.filename} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows)
    return table


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, that of a compression left out."""
    return Path(plain_name(path)).suffix.lower()


def _read_folder(path: Path, source: str, text_rows: TextRows) -> Table:
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    kinds: dict[str, list[Path]] = {}
    for file in files:
        if (kind := kind_of(file)) in READERS:
            kinds.setdefault(kind, []).append(file)
    if len(kinds) != 1:
        held = ", ".join(f"{len(of_kind):,} x {kind}" for kind, of_kind in sorted(kinds.items()))
        raise ConfigError(
            f"{path} is a folder with {'files of several kinds (' + held + ')' if kinds else 'no file of rows'}",
            where=source,
            mend="give a folder with files of one kind, or a pattern such as folder/*.jsonl"
            if kinds
            else f"rows are read from {', '.join(READERS)}",
        )
    (of_kind,) = kinds.values()
    table = joined([read_file(file, source, text_rows) for file in of_kind], source, str(path))
    table.passed_over = tuple(file.name for file in files if file not in of_kind)
    return table


def _text(path: Path) -> tuple[str, bool]:
    """The file as text, and whether some of it is not UTF-8 (those bytes become lone surrogates, U+DC80 and up)."""
    raw = read_bytes(path)
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
        content = pyarrow.parquet.ParquetFile(
            io.BytesIO(read_bytes(path)) if path.suffix.lower() in OPENERS else path
        ).read()
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


# text


def _read_text(path: Path, table: Table, rows: TextRows = "line") -> None:
    text, damaged = _text(path)
    suspicious = damaged or "\0" in text
    fill_text(text, table, rows, _bad_characters if suspicious else lambda _: None)


def _read_documents(path: Path, table: Table) -> None:
    _read_text(path, table, "document")


READERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""What each ending is read by: the only list of formats."""
