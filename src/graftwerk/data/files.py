"""Files of rows: csv, tsv, jsonl, json, parquet, txt, compressed or not; folders and pairs of them.

Every row keeps its line; what cannot be read is kept as a bad row.

Encoding and delimiter are recognised or given (`data.text_form`). A file with a few wrong bytes is still read: the rows
that hold them are bad rows, the others are good.
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
    bare,
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
from graftwerk.data.text_form import RECOGNISE, Recognised, TextForm, recognise_form
from graftwerk.errors import ConfigError, DataError, IntegrityError, ResourceError

PARQUET_BATCH = 128
"""Rows of a parquet file that are expanded at once: a row may repeat a long text that the file holds once."""


def read_file(path: Path, source: str, form: TextForm = RECOGNISE) -> Table:
    """Read all rows of a file, by its suffix, or of the files of a folder.

    Args:
        path: The file or folder.
        source: Name of the source for messages, as the run file has it.
        form: Settings of files of text.

    Raises:
        ConfigError: an ending that is not read here; a folder with files of several kinds, or of none.
        DataError: the file as a whole cannot be read (UTF-16, no header, not parquet).
        ResourceError: missing permission, or a package that reads this kind of file is not installed.
        IntegrityError: a compressed file that is damaged, or expands beyond all proportion.
    """
    if path.is_dir():
        return _read_folder(path, source, form)
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
        reader(path, table, form)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows) + len(table.bad)
    return table


def read_pair(first: Path, second: Path, source: str, form: TextForm = RECOGNISE) -> Table:
    """Read rows with `source` and `target` from two text files (whatever their suffixes), line by line.

    Raises:
        DataError: They do not have the same number of lines.
        ResourceError, IntegrityError: as for `read_file`.
    """
    table = Table(source, str(first), [], [])
    try:
        texts = [(file, _text(file, table, form, kind=".txt")[0]) for file in (first, second)]
        pair_lines(texts[0], texts[1], table)
    except OSError as error:
        raise ResourceError(f"{error.filename} cannot be read: {error.strerror}", where=source) from None
    table.read = len(table.rows)
    return table


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, without that of a compression."""
    return Path(plain_name(path)).suffix.lower()


def _read_folder(path: Path, source: str, form: TextForm) -> Table:
    of_kind, passed_over = files_in(path, source)
    table = joined([read_file(file, source, form) for file in of_kind], source, str(path))
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


def _text(path: Path, table: Table, form: TextForm, kind: str | None = None) -> tuple[str, bool, Recognised]:
    """Return the file as text, whether some of it is not in its encoding, and its form, whose notes the table gets.

    Wrong bytes become lone surrogates, U+DC80 and up.
    """
    raw = read_bytes(path)
    found = recognise_form(str(path), kind or kind_of(path), form, lambda: (raw,))
    table.notes += found.notes
    try:
        return raw.decode(found.encoding), False, found
    except UnicodeDecodeError:
        return decoded(raw, found, path), True, found


def decoded(raw: bytes, found: Recognised, path: Path) -> str:
    """Return bytes as text, wrong ones as lone surrogates.

    Raises:
        DataError: The encoding has no way to go on after a wrong byte.
    """
    try:
        return raw.decode(found.encoding, errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not {found.label}: {error.reason} at byte {error.start:,}",
            where=str(path),
            hint="leave `data.encoding` out, or name the right one",
        ) from None


def fault_in(found: Recognised) -> Fault:
    """Return the check of characters, whose messages name the encoding of the file."""
    if found.label == "UTF-8":
        return bad_characters
    return lambda text: (reason := bad_characters(text)) and reason.replace("UTF-8", found.label)


def refuse_form(form: TextForm, path: Path) -> None:
    """Refuse settings of files of text for a file of another kind.

    Raises:
        ConfigError: There are such settings.
    """
    for name in ("delimiter", "encoding"):
        if getattr(form, name) is not None:
            raise ConfigError(
                f"`data.{name}` is for files of text, and {path.name} is none", where=str(path), hint="leave it out"
            )


# csv and tsv


def _read_delimited(path: Path, table: Table, form: TextForm) -> None:
    text, fault, found = _text_and_fault(path, table, form)
    columns: dict[str, None] = {}
    lines = io.StringIO(text, newline="")
    _fill(table, columns, delimited_rows(lines, found.delimiter, columns, fault=fault, file=str(path)))


def _text_and_fault(path: Path, table: Table, form: TextForm) -> tuple[str, Fault, Recognised]:
    """Return a file's text, the check of its characters (of each one if some are wrong), and its form."""
    text, damaged, found = _text(path, table, form)
    return text, fault_in(found) if damaged or "\0" in text else no_fault, found


def _fill(table: Table, columns: dict[str, None], found: Found) -> None:
    for line, row in found:
        if isinstance(row, str):
            table.bad.append(BadRow(line, row))
        else:
            table.rows.append(row)
            table.lines.append(line)
    table.columns = tuple(columns)


# json


def _read_jsonl(path: Path, table: Table, form: TextForm) -> None:
    text, fault, _ = _text_and_fault(path, table, form)
    columns: dict[str, None] = {}
    _fill(table, columns, jsonl_rows(io.StringIO(text, newline="\n"), columns, fault=fault))


_SPACE = re.compile(r"[ \t\r\n]*")


def _read_json(path: Path, table: Table, form: TextForm) -> None:
    """Read a JSON list of objects item by item, so that each keeps its line."""
    text, fault, _ = _text_and_fault(path, table, form)
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


def _read_parquet(path: Path, table: Table, form: TextForm) -> None:
    refuse_form(form, path)
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
    """Return the content of a parquet file as a table; raise if a few bytes stand for many.

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


def _read_text(path: Path, table: Table, form: TextForm) -> None:
    text, fault, _ = _text_and_fault(path, table, form)
    columns: dict[str, None] = {}
    lines = io.StringIO(text, newline="\n")
    _fill(table, columns, rows_of_text(lines, columns, documents=form.rows == "document", fault=fault))


# words and tags


def _read_conll(path: Path, table: Table, form: TextForm) -> None:
    text, fault, _ = _text_and_fault(path, table, form)
    columns: dict[str, None] = {}
    _fill(table, columns, conll_rows(io.StringIO(text, newline="\n"), columns, fault=fault))


READERS: dict[str, Callable[[Path, Table, TextForm], None]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
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


def split_lines(text: str) -> list[str]:
    """Return lines as other programs count them (`data.parsers.bare`)."""
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [bare(line) for line in lines]


def pair_lines(source: tuple[Path, str], target: tuple[Path, str], table: Table) -> None:
    """Append rows with `source` and `target` from the lines of two files to a table.

    A line that is empty on one side is refused later, by the reader of the field, with its place.

    Raises:
        DataError: the files have not the same number of lines.
    """
    (first, source_text), (second, target_text) = source, target
    sources, targets = split_lines(source_text), split_lines(target_text)
    if len(sources) != len(targets):
        raise DataError(
            f"the two files do not belong together line by line: {first} has {len(sources):,} lines,"
            f" {second} has {len(targets):,}",
            where=f"{first}, {second}",
            hint="give two files of the same number of lines, line n of one the translation of line n of the other",
        )
    table.columns = ("source", "target")
    for line, (one, other) in enumerate(zip(sources, targets, strict=True), start=1):
        table.rows.append({"source": one, "target": other})
        table.lines.append(line)
