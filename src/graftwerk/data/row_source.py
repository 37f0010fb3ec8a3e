"""Rows that are to be answered: read one after another, each with all of its columns, and none is left out.

A row that cannot be read is there as well, with the reason, so that answer n belongs to row n of the source.
"""

from __future__ import annotations

import io
import select
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from graftwerk.data.compressed import OPENERS, opened, read_bytes
from graftwerk.data.files import PARQUET_BATCH, fault_in, files_in, kind_of, read_file, refuse_form
from graftwerk.data.parsers import MAX_FIELD_CHARACTERS, Fault, bare
from graftwerk.data.rows import Table
from graftwerk.data.sources import HUB_SCHEME, is_hub_id, matching, read_source
from graftwerk.data.stream import KINDS, opened_text, rows_of
from graftwerk.data.text_form import RECOGNISE, Recognised, TextForm
from graftwerk.errors import ConfigError, DataError, ResourceError
from graftwerk.resource_paths import locate

STDIN = "-"
"""The source that stands for standard input."""
PATIENCE = 0.2
"""Seconds without another line of standard input after which the lines read so far are handed on."""
TEXT = "text"
"""The one column of lines of text."""

Kind = Literal["text", "whole number", "number", "true or false", "JSON"]


@dataclass(frozen=True)
class SourceRow:
    """One row of a source.

    Attributes:
        place: Where it stands, for messages: ``file:line``.
        cells: Its values by column, empty if the row could not be read.
        fault: What is wrong with the row as a whole, or None.
    """

    place: str
    cells: dict[str, Any]
    fault: str | None = None


@dataclass
class RowSource:
    """A source whose rows are read anew by each iteration (standard input and iterators: only by the first).

    Iterating gives a `SourceRow` for each row, and None when a reader should not wait for the next one.

    Attributes:
        name: The source as the user named it.
        columns: Names of all columns, in order of appearance.
        total: Number of rows, or None if it is not known before they are read.
        kinds: Kind of value of each column, for formats with types.
        lines: True for lines of text, whose one column is `TEXT`.
        schema: Arrow schema of the columns of parquet files, or None.
        notes: Sentences on how files were read, if otherwise than usual.
    """

    name: str
    _found: Any = field(repr=False)
    columns: tuple[str, ...] = (TEXT,)
    total: int | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    lines: bool = False
    schema: Any = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[SourceRow | None]:
        found: Iterator[SourceRow | None] = self._found()
        return found


def open_source(source: str | Path, form: TextForm = RECOGNISE) -> RowSource:
    """Open a source of rows for prediction; files are gone through once for the number of their rows and columns.

    Args:
        source: A file, folder, pattern, ``pkg://...`` or hub id as for training, or ``-`` for lines of standard input.
        form: Settings of files of text.

    Raises:
        ConfigError: There is no such source.
        DataError, IntegrityError, ResourceError: As for `read_source`.
    """
    name = str(source)
    if name == STDIN:
        return RowSource("standard input", lambda: _standard_input(sys.stdin, form), lines=True)
    if name.startswith(HUB_SCHEME) or is_hub_id(name):
        table = read_source(name, form=form)
        return _surveyed(name, lambda columns: _table_rows(table, columns))
    listed = matching(name)
    path = locate(name) if listed is None else None
    if path is not None:
        listed = files_in(path, name)[0] if path.is_dir() else [path]
    files = listed or []
    notes: dict[str, None] = {}
    kinds = {kind_of(file) for file in files}
    if kinds == {".txt"}:
        total = sum(1 for _ in _all_lines(files, form, notes))
        return RowSource(name, lambda: _all_lines(files, form, {}), total=total, lines=True, notes=tuple(notes))
    opened_source = _surveyed(name, lambda columns: _rows_of_files(files, name, columns, form, notes))
    opened_source.notes = tuple(notes)
    if kinds == {".parquet"}:
        opened_source.schema = _parquet(files[0]).schema_arrow
    return opened_source


def source_of(rows: Iterable[str | Mapping[str, Any]]) -> RowSource:
    """Return a source of texts, or of rows as mappings, that were handed over in Python.

    Args:
        rows: All texts, or all mappings; an iterator is read as the answers are asked for.

    Raises:
        ConfigError: The first row is neither, while this is called; another kind follows, while they are read.
    """
    given = iter(rows)
    listed = rows if isinstance(rows, Sequence) else None
    begun = list(islice(given, 1))
    if begun and not isinstance(begun[0], str | Mapping):
        raise ConfigError(f"the first row is of type {type(begun[0]).__name__}", hint="give texts, or mappings")
    as_text = not (begun and isinstance(begun[0], Mapping))
    # mappings of an iterator may bring columns later that are not known yet: those of the first row are what counts
    known = () if as_text else dict.fromkeys(str(key) for row in (listed or begun) for key in _mapping(row))

    def found() -> Iterator[SourceRow]:
        for number, row in enumerate(listed if listed is not None else chain(begun, given), start=1):
            # what is no text among texts is a row that cannot be answered, as an empty text is
            cells = {TEXT: row} if as_text and not isinstance(row, Mapping) else dict(_mapping(row))
            yield SourceRow(f"row {number}", cells)

    return RowSource(
        "the rows",
        found,
        columns=(TEXT,) if as_text else tuple(known),
        total=None if listed is None else len(listed),
        lines=as_text,
    )


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ConfigError(f"a row is of type {type(row).__name__}", hint="give texts alone, or mappings alone")
    return row


# -- files -------------------------------------------------------------------------------------------------------------


def _surveyed(name: str, found: Any) -> RowSource:
    """Go through all rows once, for their number, their columns and the kinds of values."""
    columns: dict[str, None] = {}
    kinds: dict[str, Kind] = {}
    total = 0
    for row in found(columns):
        total += 1
        for column, value in row.cells.items():
            if value is not None and kinds.get(column) != "JSON":
                now = _kind(value)
                kinds[column] = now if kinds.setdefault(column, now) == now else _joint(kinds[column], now)
    if not total:
        raise DataError(f"{name} has no rows", where=name, hint="below a header, each line is a row")
    return RowSource(name, lambda: found({}), columns=tuple(columns), total=total, kinds=kinds)


def _kind(value: Any) -> Kind:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "whole number" if abs(value) < 1 << 63 else "JSON"
    return {str: "text", float: "number"}.get(type(value), "JSON")  # type: ignore[return-value]


def _joint(one: Kind, other: Kind) -> Kind:
    return "number" if {one, other} == {"whole number", "number"} else "JSON"


def _rows_of_files(
    files: Sequence[Path], name: str, columns: dict[str, None], form: TextForm, notes: dict[str, None]
) -> Iterator[SourceRow]:
    for file in files:
        kind = kind_of(file)
        if kind in KINDS:
            for line, row in rows_of(file, columns, form, lambda text: notes.setdefault(text)):
                place = f"{file}:{line}"
                yield SourceRow(place, {}, row) if isinstance(row, str) else SourceRow(place, row)
        elif kind == ".parquet" and file.suffix.lower() not in OPENERS:
            refuse_form(form, file)
            yield from _parquet_rows(file, columns)
        else:
            yield from _table_rows(read_file(file, name, form), columns)


def _table_rows(table: Table, columns: dict[str, None]) -> Iterator[SourceRow]:
    """Yield the rows of a table, the bad ones in their places."""
    columns.update(dict.fromkeys(table.columns))
    rows = [(line, SourceRow(table.at(line), row)) for line, row in zip(table.lines, table.rows, strict=True)]
    rows += [(bad.line, SourceRow(table.at(bad.line), {}, bad.reason)) for bad in table.bad]
    yield from (row for _, row in sorted(rows, key=lambda pair: pair[0]))


def _parquet(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ResourceError(
            "reading parquet needs the package pyarrow", where=str(file), hint="pip install 'graftwerk[data]'"
        ) from None
    try:
        raw = io.BytesIO(read_bytes(file)) if file.suffix.lower() in OPENERS else opened(file)
        return pyarrow.parquet.ParquetFile(raw)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise ResourceError(f"{file} cannot be read: {error.strerror}", where=str(file)) from None
        raise DataError(f"not a readable parquet file: {str(error).splitlines()[0]}", where=str(file)) from None


def _parquet_rows(file: Path, columns: dict[str, None]) -> Iterator[SourceRow]:
    """Yield the rows of a parquet file batch by batch: it is never in memory as a whole."""
    import pyarrow

    content = _parquet(file)
    columns.update(dict.fromkeys(content.schema_arrow.names))
    number = 0
    try:
        for batch in content.iter_batches(batch_size=PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield SourceRow(f"{file} row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the parquet file is damaged: {str(error).splitlines()[0]}", where=str(file)) from None


# -- lines of text -----------------------------------------------------------------------------------------------------


def _all_lines(files: Sequence[Path], form: TextForm, notes: dict[str, None]) -> Iterator[SourceRow]:
    """Yield every line of text files, blank ones as well: answer n belongs to line n."""
    for file in files:
        with opened_text(file, form, "\n") as (lines, found):
            notes |= dict.fromkeys(found.notes)
            fault = fault_in(found)
            for number, line in enumerate(lines, start=1):
                yield _line(f"{file}:{number}", bare(line), fault)


def _line(place: str, text: str, fault: Fault) -> SourceRow:
    reason = fault(text)
    return SourceRow(place, {TEXT: text if reason is None else text.encode("utf-8", "replace").decode()}, reason)


def _standard_input(stream: Any, form: TextForm) -> Iterator[SourceRow | None]:
    """Yield the lines of standard input, and None when the next one keeps us waiting."""
    raw: BinaryIO = stream.buffer
    found = Recognised(form.encoding or "utf-8-sig", ",")
    fault = fault_in(found)
    rest, number = b"", 0
    while piece := raw.read1(1 << 16):  # type: ignore[attr-defined]
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            number += 1
            yield _line(f"line {number}", _decoded(line, number, found), fault)
        if len(rest) > MAX_FIELD_CHARACTERS:
            raise DataError("a line of standard input does not end", where=f"line {number + 1}")
        if not _ready(raw):
            yield None
    if rest:
        yield _line(f"line {number + 1}", _decoded(rest, number + 1, found), fault)


def _decoded(line: bytes, number: int, found: Recognised) -> str:
    encoding = "utf-8" if found.label == "UTF-8" and number > 1 else found.encoding
    return bare(line.decode(encoding, errors="surrogateescape"))


def _ready(stream: BinaryIO) -> bool:
    """Return True if there is more to read at once, or no way to tell."""
    try:
        return bool(select.select([stream.fileno()], [], [], PATIENCE)[0])
    except (OSError, ValueError):  # no file descriptor, as in a test
        return True
