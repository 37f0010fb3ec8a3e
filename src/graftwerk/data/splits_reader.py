"""From the data settings of a run to the rows of its splits, for every task: only what a row must have differs.

A task says with a `RowFormat` which parts a row has, which of them identifies it and what it is stratified by; reading,
counting what is left out, splitting and looking for repeated rows are the same for all and stand here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from graftwerk.data.checks import PlacedRows
from graftwerk.data.fields import Part
from graftwerk.data.findings import Issue
from graftwerk.data.formats import columns_of_format, messages_part, says, unused_keys
from graftwerk.data.rows import BadRow, Table, form_notes, resolve_bad_rows, unused_columns
from graftwerk.data.settings import DataSettings, Source, plain, source_name
from graftwerk.data.sources import name_parts, read_source
from graftwerk.data.split import held_out, split_rows
from graftwerk.data.text_form import TextForm
from graftwerk.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RowFormat:
    """Format of a task's rows.

    Attributes:
        parts: Required fields, each with the reader of its value (`data.fields`), which returns the cleaned value or
            raises a ValueError that says what is wrong.
        key: The field, or a function of a row, whose text identifies the row: rows with equal text stay in one split,
            and count as duplicates or leakage.
        optional: Fields that are read if a row has them.
        stratify: The field whose shares every split keeps, or None for a split without strata.
        answers: Fields that are neither needed nor read for prediction.
        shape: Function from the fields read to the task's row (messages from instruction and output, say), or None; a
            ValueError makes it a bad row, reported with its place.
        ask: As `shape`, for prediction; or None to use `shape` there too.
        format: Name of the format in `data.formats`, or None if this task has only one.
        more_fields: Fields that rows of this format have beyond the task's own, and that count in the fingerprint.
    """

    parts: Mapping[str, Part]
    key: str | Callable[[Mapping[str, Any]], str]
    optional: Mapping[str, Part] = field(default_factory=dict)
    stratify: str | None = None
    answers: tuple[str, ...] = ()
    shape: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ask: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    format: str | None = None
    more_fields: tuple[str, ...] = ()

    def key_of(self, row: Mapping[str, Any]) -> str:
        """Return the text that identifies a row."""
        return str(row[self.key]) if isinstance(self.key, str) else self.key(row)


Recognise = Callable[[Sequence[str]], RowFormat]
"""Given the parts that the columns of a source can play (its columns, as `data.columns` renames them), what its rows
are. Called once a source; most tasks read all alike."""


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split: some of a table's."""

    table: Table
    indices: Sequence[int]
    reading: RowFormat

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the split, in its order."""
        return [self.table.rows[index] for index in self.indices]

    def where(self, index: int) -> str:
        """Return the place (`file:line`) of a row, by its index in `rows`."""
        return self.table.where(self.indices[index])

    def placed(self) -> PlacedRows:
        """Return for the checks what identifies each row, its class if there are classes, and its place."""
        rows, by = self.rows, self.reading.stratify
        return PlacedRows(
            [self.reading.key_of(row) for row in rows], None if by is None else [row[by] for row in rows], self.where
        )


def read_splits(data: DataSettings, recognise: Recognise) -> tuple[dict[str, SplitRows], list[Issue]]:
    """Read the rows of ``train``, ``validation`` and ``test``; return them with the issues found.

    Raises:
        ConfigError: no such source, column or split size.
        DataError: unreadable or unusable rows.
        ResourceError: a source cannot be reached.
    """
    findings: list[Issue] = []
    table, reading = _table(data.source, data, data.split, recognise, findings)
    chosen: dict[str, SplitRows] = {}
    counts = {"validation": 0, "test": 0}
    for split, wanted in (("validation", data.validation), ("test", data.test)):
        if wanted is None or isinstance(wanted, int | float):
            counts[split] = held_out(wanted, len(table), f"data.{split}")
            continue
        _refuse_same(wanted, data, split)
        other, its_reading = _table(wanted, data, split, recognise, findings)
        chosen[split] = SplitRows(other, range(len(other)), its_reading)
    if data.train_seed is not None and not counts["validation"] and data.max_train_rows is None:
        raise ConfigError(
            "`train_seed` draws nothing: all rows are trained on, and the validation rows are a source of their own",
            where="data.train_seed",
            hint="leave it out, or hold out validation rows: data.validation=0.1",
        )
    by = reading.stratify
    train, validation, test = split_rows(
        [reading.key_of(row) for row in table.rows],
        None if by is None else [row[by] for row in table.rows],
        **counts,
        max_train=data.max_train_rows,
        split_seed=data.split_seed,
        train_seed=data.train_seed,
    )
    if data.max_train_rows is not None and len(train) < data.max_train_rows:
        message = f"there are {len(train):,} training rows, fewer than the {data.max_train_rows:,} of `max_train_rows`"
        findings.append(Issue("fewer-rows", message, len(train), hint="give more data, or ask for fewer rows"))
    for split, indices in zip(SPLITS, (train, validation, test), strict=True):
        chosen.setdefault(split, SplitRows(table, indices, reading))
    return {split: chosen[split] for split in SPLITS}, findings


def held_out_elsewhere(
    data: DataSettings, recognise: Recognise, findings: list[Issue]
) -> tuple[dict[str, SplitRows], RowFormat | None]:
    """Read the rows of ``validation`` and ``test`` that have sources of their own; other splits are empty."""
    chosen: dict[str, SplitRows] = {}
    reading: RowFormat | None = None
    for split, wanted in (("validation", data.validation), ("test", data.test)):
        if wanted is None or isinstance(wanted, int | float):
            chosen[split] = SplitRows(Table("", "", [], []), (), RowFormat({}, key=lambda row: ""))
            continue
        _refuse_same(wanted, data, split)
        table, reading = _table(wanted, data, split, recognise, findings)
        chosen[split] = SplitRows(table, range(len(table)), reading)
    return chosen, reading


def _refuse_same(wanted: Source, data: DataSettings, split: str) -> None:
    if wanted == data.source:
        raise ConfigError(
            f"`{split}` is the same source as `train`: its metrics would say nothing",
            where=f"data.{split}",
            hint="give a number of rows or a share to hold out, or another source",
        )


def read_unanswered(
    source: str,
    recognise: Recognise,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> tuple[Table, tuple[Issue, ...]]:
    """Read rows for prediction: no row needs an answer, and existing answers are not read.

    Returns:
        The table (``table.where(i)`` is the file and line of ``table.rows[i]``), and what was left out.

    Raises:
        ConfigError, DataError, ResourceError: as for reading rows to learn from.
    """
    return unanswered(read_source(source), recognise, columns, on_bad_row)


def unanswered(
    raw: Table,
    recognise: Recognise,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> tuple[Table, tuple[Issue, ...]]:
    """Return rows for prediction from rows as they were read: the second half of `read_unanswered`.

    Raises:
        ConfigError, DataError: As for reading rows to learn from.
    """
    asked, renamed = unanswered_format(raw, recognise, columns or {})
    table = named(raw, asked, renamed, {})
    findings = form_notes(table.notes) + resolve_bad_rows(table, on_bad_row)
    if not table.rows:
        raise DataError(f"{raw.source} has no rows", where=table.shown, hint="below a header, each line is a row")
    return table, findings


def unanswered_format(raw: Table, recognise: Recognise, columns: Mapping[str, str]) -> tuple[RowFormat, dict[str, str]]:
    """Return the format of rows that are to be answered, and the columns of its fields.

    Args:
        raw: The rows as they were read; only the names of their columns are looked at.
        recognise: The task's function from column names to a format.
        columns: Column of each field, as for training.

    Raises:
        ConfigError: The rows have no format of the task.
    """
    reading = recognise(_parts_of(raw, columns))
    asked = RowFormat(
        {part: read for part, read in reading.parts.items() if part not in reading.answers},
        reading.key,
        {part: read for part, read in reading.optional.items() if part not in reading.answers},
        shape=reading.ask or reading.shape,
    )
    return asked, {part: column for part, column in columns.items() if part not in reading.answers}


def fingerprint_of(chosen: Mapping[str, Sequence[Mapping[str, Any]]], parts: Sequence[str], head: Any = ()) -> str:
    """Hash of every row of every split in order, and of ``head``, which fixes what the rows mean (label names).

    The settings that made the splits (source, filter, seed, sizes) count through the rows that they chose, so that
    moved or renamed files stay the same data.

    Args:
        chosen: The rows of each split.
        parts: Fields of a row that count, in this order; a field that a row does not have counts as null.
        head: A JSON value that counts too; empty if there is none.
    """
    digest = hashlib.sha256(json.dumps(list(head)).encode())
    for split, rows in chosen.items():
        digest.update(json.dumps([split, len(rows)]).encode())
        for row in rows:
            digest.update(json.dumps([row.get(part) for part in parts]).encode())
    return digest.hexdigest()


def origin_of(data: DataSettings, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the sources and numbers of rows, for the manifest and the model card."""
    origin: dict[str, Any] = {
        "train": [plain(each) for each in data.train] if isinstance(data.train, list) else plain(data.train),
        "validation": plain(data.validation),
        "test": plain(data.test),
    }
    origin |= {"columns": dict(data.columns), "filter": dict(data.filter), "split_seed": data.split_seed}
    if data.train_seed is not None:
        origin["train_seed"] = data.train_seed
    origin["rows"] = dict(counts)
    return origin


def _table(
    source: Source, data: DataSettings, split: str, recognise: Recognise, findings: list[Issue]
) -> tuple[Table, RowFormat]:
    raw = read_source(source, split, form_of(data))
    reading = reading_of(raw, data, recognise)
    table = named(raw, reading, data.columns, data.filter)
    findings += form_notes(table.notes)
    findings += resolve_bad_rows(table, data.on_bad_row)
    findings += unused_columns(table.unused, source_name(source))
    if table.passed_over:
        count, first = len(table.passed_over), table.passed_over[0]
        name = source_name(source)
        message = f"{count:,} files of {name} are of no kind that rows are read from, and were passed over"
        findings.append(Issue("files-passed-over", message, 0, example=first))
    if table.unmatched:
        message = f"no row of {source_name(source)} has {', '.join(table.unmatched)}, which the filter asks for"
        findings.append(Issue("filter-unmatched", message, 0, hint="check the spelling in `data.filter`"))
    if not table.rows:
        raise DataError(
            f"{source_name(source)} has no rows that can be used",
            where=table.shown,
            hint="give a file with at least two rows",
        )
    return table, reading


def form_of(data: DataSettings) -> TextForm:
    """Return the settings of files of text."""
    return TextForm(data.text_rows, data.delimiter, data.encoding)


def reading_of(raw: Table, data: DataSettings, recognise: Recognise) -> RowFormat:
    """Return the format of the rows of a source.

    Args:
        raw: The rows as they were read.
        data: The settings, with `columns` and perhaps `format`.
        recognise: The task's function from column names to a format.

    Raises:
        ConfigError: The rows have no format of the task, or not the one in `data.format`.
    """
    reading = recognise(columns_of_format(_parts_of(raw, data.columns), data.format))
    if data.format != reading.format and data.format is not None:
        raise ConfigError(
            f"`{data.format}` is no format of this task's rows", where="data.format", hint="leave `data.format` out"
        )
    return reading


def _parts_of(table: Table, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the columns after `data.columns` has renamed them; one column may serve as several fields."""
    renamed = set(columns.values())
    return (*columns, *(column for column in table.columns if column not in renamed and column not in columns))


def _unused(raw: Table, reading: RowFormat, columns: Mapping[str, str], filter: Mapping[str, Any]) -> Counter[str]:
    """Count the rows of conversations that say something where nothing reads it: in a column, or in a message.

    Columns beside a text and its class are notes of whoever made the file; beside a conversation, they are of it.
    """
    if reading.format in (None, "text"):
        return Counter()
    parts = {**reading.parts, **reading.optional}
    read = {*(columns.get(part, part) for part in parts), *filter}
    left = [column for column in raw.columns if column not in read]
    messages = [columns.get(part, part) for part, reader in parts.items() if reader is messages_part]
    counted: Counter[str] = Counter()
    for row in raw.rows:
        counted.update(column for column in left if says(row.get(column)))
        for column in messages:
            counted.update(f"{column}[].{key}" for key in unused_keys(row.get(column)))
    return counted


def named(
    raw: Table, reading: RowFormat, columns: Mapping[str, str], filter: Mapping[str, Any], *, whole: bool = True
) -> Table:
    """Return the rows as the task understands them; ``whole`` as for `name_parts`."""
    table = name_parts(raw, parts=reading.parts, optional=reading.optional, columns=columns, filter=filter, whole=whole)
    table.unused = _unused(raw, reading, columns, filter)
    if reading.shape is None:
        return table
    rows, lines = [], []
    for line, row in zip(table.lines, table.rows, strict=True):
        try:
            rows.append(reading.shape(row))
        except ValueError as error:
            table.bad.append(BadRow(line, str(error)))
        else:
            lines.append(line)
    table.rows, table.lines = rows, lines
    return table
