"""Rows as they were read: each with the line it stands on, and beside them the ones that could not be read."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graftwerk.data.findings import Issue
from graftwerk.errors import DataError

SHOWN = 5
"""Bad rows that a message lists; the rest are counted."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. ``line`` counts from 1 (for parquet and hub data: the row's number)."""

    line: int
    reason: str


@dataclass
class Table:
    """Rows of one source.

    Attributes:
        source: As the user named it.
        shown: What stands in front of the line in messages: the file's path, or the hub id.
        rows: One mapping a row.
        lines: For each row, its first line in the file, from 1.
        bad: Rows left out, in order of their lines.
        columns: Every column there is, in order of appearance.
        unit: Whether `lines` counts lines of a text file or rows of a table.
        read: Rows seen, the bad and the filtered ones included.
        unmatched: `column: value` of the filter that no row has, where others of its values have rows.
        passed_over: Files of a folder that are of no kind that rows are read from.
        notes: Sentences on how the files were read, if otherwise than usual.
        unused: Columns, and keys of messages, that nothing reads, each with how many rows say something there.
        pieces: For rows of several files, each file's table without its rows, and what its lines are counted from:
            line n of the file is line ``offset + n`` of this table.
    """

    source: str
    shown: str
    rows: list[dict[str, Any]]
    lines: list[int]
    bad: list[BadRow] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    unit: Literal["line", "row"] = "line"
    read: int = 0
    unmatched: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unused: Counter[str] = field(default_factory=Counter)
    pieces: tuple[tuple[int, Table], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, line: int) -> str:
        """Return `file:line`, or `file row n` if the file has no lines."""
        if self.pieces:
            offset, piece = self.pieces[bisect(self.pieces, line - 1, key=lambda pair: pair[0]) - 1]
            return piece.at(line - offset)
        return f"{self.shown}:{line}" if self.unit == "line" else f"{self.shown} row {line}"

    def where(self, index: int) -> str:
        """Return the place of a row, by its index in `rows`."""
        return self.at(self.lines[index])


def joined(tables: Sequence[Table], source: str, shown: str) -> Table:
    """Concatenate the rows of several tables; every row keeps its file and line.

    Raises:
        DataError: the tables have no column in common (a file with another header).
    """
    whole = Table(source, shown, [], [], columns=tuple(dict.fromkeys(name for it in tables for name in it.columns)))
    pieces = []
    offset = 0
    for table in tables:
        if table.columns and not set(table.columns) & set(tables[0].columns or table.columns):
            raise DataError(
                f"{table.shown} has the columns {', '.join(table.columns)}, and {tables[0].shown} has"
                f" {', '.join(tables[0].columns)}",
                where=source,
                hint="read files with other columns as sets of their own, each with its `columns`",
            )
        pieces.append((offset, replace(table, rows=[], lines=[], bad=[])))
        whole.rows += table.rows
        whole.lines += [offset + line for line in table.lines]
        whole.bad += [BadRow(offset + bad.line, bad.reason) for bad in table.bad]
        whole.read += table.read
        offset += max([0, *table.lines, *(bad.line for bad in table.bad)])
        whole.passed_over += table.passed_over
        whole.notes += table.notes
    whole.pieces = tuple(pieces)
    return whole


def unused_columns(unused: Counter[str], source: str) -> tuple[Issue, ...]:
    """Say which columns of a source, and keys of its messages, nothing reads."""
    if not unused:
        return ()
    listed = ", ".join(f"`{name}` ({count:,} rows)" for name, count in unused.most_common(20))
    more = f", and {len(unused) - 20:,} more" if len(unused) > 20 else ""
    message = f"{len(unused):,} columns or keys of {source} are not used: {listed}{more}"
    hint = "`data.columns` says which column plays which part; nothing, if they are not needed"
    return (Issue("unused-columns", message, max(unused.values()), hint=hint),)


def form_notes(notes: Iterable[str]) -> tuple[Issue, ...]:
    """Return what is to be said of how files were read: an encoding or a delimiter that was recognised."""
    return tuple(Issue("text-form", note, 0) for note in notes)


def resolve_bad_rows(table: Table, on_bad_row: Literal["fail", "skip"]) -> tuple[Issue, ...]:
    """Stop at rows that cannot be used, or count them.

    Raises:
        DataError: there are bad rows and ``on_bad_row`` is ``fail``; the first places and reasons are listed.
    """
    table.bad.sort(key=lambda bad: bad.line)
    places = [f"{table.at(bad.line)}: {bad.reason}" for bad in table.bad[:SHOWN]]
    return apply_bad_row_policy(len(table.bad), places, table.read, table.source, on_bad_row)


def apply_bad_row_policy(
    count: int, places: Sequence[str], read: int, source: str, on_bad_row: Literal["fail", "skip"]
) -> tuple[Issue, ...]:
    """Apply `data.on_bad_row` to a number of bad rows, as `resolve_bad_rows` does to those of a table.

    Args:
        count: Number of bad rows.
        places: Place and reason of the first few.
        read: Number of rows read.
        source: Name of the source, for messages.
        on_bad_row: Raise, or report the number left out.

    Raises:
        DataError: There are bad rows and ``on_bad_row`` is ``fail``.
    """
    if not count:
        return ()
    more = count - len(places)
    message = f"{count:,} of {read:,} rows of {source} cannot be used"
    if on_bad_row == "fail":
        raise DataError(
            message,
            where="; ".join(places) + (f"; and {more:,} more" if more else ""),
            hint="correct these rows, or set `data.on_bad_row: skip` to leave them out and have them counted",
        )
    return (Issue("rows-skipped", f"{message} and were left out", count, example=places[0]),)
