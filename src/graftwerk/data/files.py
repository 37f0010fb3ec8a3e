"""Files of rows: csv, tsv, jsonl, json, parquet, txt, compressed or not; folders and pairs of them.

Every row keeps its line; what cannot be read is kept as a bad row.

Text is UTF-8, with or without a byte order mark. A file with a few wrong bytes is still read: the rows that hold them
are bad rows, the others are good.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.data.compressed import FREE_BYTES, MAX_RATIO, OPENERS, opened, plain_name, read_bytes
from graftwerk.data.parsers import (
    DECODER,
    Fault,
    Found,
    bad_characters,
    conll_rows,
    delimited_rows,
    json_kind,
    jsonl_rows,
    no_fault,
)
from graftwerk.data.parsers import (
    text_rows as rows_of_text,
)
from graftwerk.data.rows import BadRow, Table, joined
from graftwerk.data.textfiles import TextRows, pair_lines
from graftwerk.errors import ConfigError, DataError, IntegrityError, ResourceError

PARQUET_BATCH = 128
"""Rows of a parquet file that are expanded at once: a row may repeat a long text that the file holds once."""


def read_file(path: Path, source: str, text_rows: TextRows = "line") -> Table:
    """Read all rows of a file, by its suffix, or of the files of a folder.

    Args:
        path: The file or folder.
        source: Name of the source for messages, as the run file has it.
        text_rows: Unit of a .txt file that is one row: a line, or a document between blank lines.

    Raises:
        ConfigError: an ending that is not read here; a folder with files of several kinds, or of none.
        DataError: the file as a whole cannot be read (UTF-16, no header, not parquet).
        ResourceError: missing permission, or a package that reads this kind of file is not installed.
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
                hint=f"rows are read from {', '.join(READERS)}, also with {', '.join(OPENERS)} behind it",
                where=source,
            )
        (_read_documents if reader is _read_text and text_rows == "document" else reader)(path, table)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows) + len(table.bad)
    return table


def read_pair(first: Path, second: Path, source: str) -> Table:
    """Read rows with `source` and `target` from two text files (whatever their suffixes), line by line.

    Raises:
        DataError: They do not have the same number of lines.
        ResourceError, IntegrityError: as for `read_file`.
    """
    table = Table(source, str(first), [], [])
    try:
        pair_lines((first, _text(first)[0]), (second, _text(second)[0]), table)
    except OSError as error:
        raise ResourceError(f"{error.filename} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows)
    return table


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, without that of a compression."""
    return Path(plain_name(path)).suffix.lower()


def _read_folder(path: Path, source: str, text_rows: TextRows) -> Table:
    of_kind, passed_over = files_in(path, source)
    table = joined([read_file(file, source, text_rows) for file in of_kind], source, str(path))
    table.passed_over = passed_over
    return table


def files_in(path: Path, source: str) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files of rows in a folder, sorted, and the names of other files.

    Raises:
        ConfigError: files of several kinds, or of none.
    """
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
            hint="give a folder with files of one kind, or a pattern such as folder/*.jsonl"
            if kinds
            else f"rows are read from {', '.join(READERS)}",
        )
    (of_kind,) = kinds.values()
    return of_kind, tuple(file.name for file in files if file not in of_kind)


def _text(path: Path) -> tuple[str, bool]:
    """The file as text, and whether some of it is not UTF-8 (those bytes become lone surrogates, U+DC80 and up)."""
    raw = read_bytes(path)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("the file is UTF-16, not UTF-8", where=f"{path}:1", hint="save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="surrogateescape"), True


# csv and tsv


def _read_delimited(path: Path, table: Table, delimiter: str) -> None:
    text, fault = _text_and_fault(path)
    columns: dict[str, None] = {}
    lines = io.StringIO(text, newline="")
    _fill(table, columns, delimited_rows(lines, delimiter, columns, fault=fault, file=str(path)))


def _text_and_fault(path: Path) -> tuple[str, Fault]:
    """Characters are only looked at one by one where some of the file are wrong."""
    text, damaged = _text(path)
    return text, bad_characters if damaged or "\0" in text else no_fault


def _fill(table: Table, columns: dict[str, None], found: Found) -> None:
    for line, row in found:
        if isinstance(row, str):
            table.bad.append(BadRow(line, row))
        else:
            table.rows.append(row)
            table.lines.append(line)
    table.columns = tuple(columns)


def _read_csv(path: Path, table: Table) -> None:
    _read_delimited(path, table, ",")


def _read_tsv(path: Path, table: Table) -> None:
    _read_delimited(path, table, "\t")


# json


def _read_jsonl(path: Path, table: Table) -> None:
    text, fault = _text_and_fault(path)
    columns: dict[str, None] = {}
    _fill(table, columns, jsonl_rows(io.StringIO(text, newline="\n"), columns, fault=fault))


_SPACE = re.compile(r"[ \t\r\n]*")


def _read_json(path: Path, table: Table) -> None:
    """Read a JSON list of objects item by item, so that each keeps its line."""
    text, fault = _text_and_fault(path)
    columns: dict[str, None] = {}
    position, line, counted = _skip_space(text, 0), 1, 0
    if text[position : position + 1] != "[":
        raise DataError(
            "a .json file of rows is a list of objects", where=f"{path}:1", hint="one object a line is .jsonl"
        )
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = DECODER.raw_decode(text, position)
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError("a comma or the end of the list is missing after this item")
        except (ValueError, RecursionError, StopIteration) as error:
            # Where one item ends and the next begins is unknown from here on, so nothing after it can be saved.
            raise DataError(
                f"broken JSON: {error}", where=f"{path}:{line}", hint="correct it, or write one object a line (.jsonl)"
            ) from None
        reason = None if fault is no_fault else fault(text[position:end])
        if reason is None and not isinstance(row, dict):
            reason = f"is {json_kind(row)}, not an object"
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
        raise ResourceError(
            "reading parquet needs the package pyarrow", where=str(path), hint="pip install 'graftwerk[data]'"
        ) from None
    try:
        with opened(path) as raw:
            file = pyarrow.parquet.ParquetFile(io.BytesIO(read_bytes(path)) if path.suffix.lower() in OPENERS else raw)
            content = _bounded(file, path)
    except MemoryError:
        raise ResourceError(f"{path.name} does not fit into the memory", where=str(path)) from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(f"not a readable parquet file: {str(error).splitlines()[0]}", where=str(path)) from None
    names: list[str] = content.column_names
    if wrong := [name for name in names if bad_characters(name)]:
        raise DataError(f"the column {wrong[0]!a:.80} {bad_characters(wrong[0])}", where=str(path))
    if len(set(names)) != len(names):
        raise DataError("two columns have the same name", where=str(path), hint=f"columns: {', '.join(names)}")
    table.rows = content.to_pylist()
    table.lines = list(range(1, len(table.rows) + 1))
    table.columns = tuple(names)
    table.unit = "row"


def _bounded(file: Any, path: Path) -> Any:
    """The content of a parquet file as a table, refused while it is read where a few bytes stand for many.

    Raises:
        IntegrityError: it expands beyond all proportion.
    """
    import pyarrow

    size = path.stat().st_size
    most = max(FREE_BYTES, MAX_RATIO * size)
    values = file.metadata.num_rows * max(1, file.metadata.num_columns)
    parts, held = [], 0
    for part in file.iter_batches(batch_size=PARQUET_BATCH) if values <= most else ():
        parts.append(part)
        held += part.nbytes
        if held > most:
            break
    if values > most or held > most:
        raise IntegrityError(
            f"the file expands to more than {MAX_RATIO} times its {size:,} bytes",
            where=str(path),
            hint="if you trust it, write its rows to a .jsonl file and give that",
        )
    return pyarrow.Table.from_batches(parts, schema=file.schema_arrow)


# text


def _read_text(path: Path, table: Table, rows: TextRows = "line") -> None:
    text, fault = _text_and_fault(path)
    columns: dict[str, None] = {}
    lines = io.StringIO(text, newline="\n")
    _fill(table, columns, rows_of_text(lines, columns, documents=rows == "document", fault=fault))


def _read_documents(path: Path, table: Table) -> None:
    _read_text(path, table, "document")


# words and tags


def _read_conll(path: Path, table: Table) -> None:
    text, fault = _text_and_fault(path)
    columns: dict[str, None] = {}
    _fill(table, columns, conll_rows(io.StringIO(text, newline="\n"), columns, fault=fault))


READERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".iob": _read_conll,
}
"""What each ending is read by: the only list of formats."""
