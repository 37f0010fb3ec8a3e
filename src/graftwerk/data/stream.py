"""Training rows that are read as they are needed, for files larger than the memory (`data.streaming`).

A stream is read from its beginning each time, and rows that have passed are not stored. A first pass before training
reads and checks every row, so that issues, classes and the number of rows are known as they are for rows in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

from graftwerk.data.checks import PlacedRows, missing_in, missing_texts
from graftwerk.data.compressed import Expanded, pieces
from graftwerk.data.files import fault_in, files_in, kind_of
from graftwerk.data.findings import Issue
from graftwerk.data.parsers import Found, delimited_rows, jsonl_rows, text_rows
from graftwerk.data.rows import SHOWN, BadRow, Table, apply_bad_row_policy, form_notes, unused_columns
from graftwerk.data.settings import DataSettings, Pair, Source, source_name
from graftwerk.data.sources import HUB_SCHEME, is_hub_id, matching
from graftwerk.data.split import fold
from graftwerk.data.splits_reader import Recognise, RowFormat, SplitRows, form_of, held_out_elsewhere, named, reading_of
from graftwerk.data.text_form import USUAL, Recognised, TextForm, recognise_form
from graftwerk.errors import ConfigError, DataError, ResourceError
from graftwerk.resource_paths import locate

KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
CHUNK = 1000
"""Rows that are read and checked at a time."""
REMEMBERED = 1_000_000
"""Texts whose hashes are kept to find repeated ones: about 100 MB."""


class StreamedRows(Sequence[dict[str, Any]]):
    """The training rows in the order of their files. Going through them reads them anew; so does asking for one.

    Args:
        count: How many rows there are.
    """

    def __init__(self, data: DataSettings, recognise: Recognise, count: int) -> None:
        self._data, self._recognise, self._count = data, recognise, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, read anew from the files.

        Raises:
            DataError: there are fewer rows than were counted: the files have changed.
        """
        met = 0
        for table, _ in _tables(self._data, self._recognise):
            for row in islice(table.rows, self._count - met):
                met += 1
                yield row
            if met == self._count:
                return
        raise DataError(
            f"there are {met:,} rows where {self._count:,} were counted before training: the files have changed",
            where=source_name(self._data.source),
            hint="leave the files as they are while they are trained on",
        )

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self._count)))
        return next(islice(self, range(self._count)[index], None))

    def where(self, index: int) -> str:
        """Return the place (`file:line`) of a row."""
        for table, _ in _tables(self._data, self._recognise):
            if index < len(table):
                return table.where(index)
            index -= len(table)
        raise IndexError(index)


@dataclass(frozen=True)
class Streamed:
    """Results of the first pass over streamed rows.

    Attributes:
        rows: The training rows.
        held: The rows of ``validation`` and ``test``, in memory.
        issues: Issues found while reading.
        classes: For each split, the number of rows of each class, or None if rows have no class.
        repeated: Text and place of each training row whose text is also held out, once each.
        digest: Hash of the training rows in order.
        formats: For each split that has rows, their format.
    """

    rows: StreamedRows
    held: dict[str, SplitRows]
    issues: list[Issue]
    classes: dict[str, Counter[str]] | None
    repeated: PlacedRows
    digest: str
    formats: dict[str, RowFormat]


def read_stream(data: DataSettings, recognise: Recognise, parts: Sequence[str]) -> Streamed:
    """Go through the training rows once; read the rows that are held out, which are sources of their own.

    Args:
        data: Sources and settings.
        recognise: Function from the columns of a source to the format of its rows.
        parts: Fields of which the digest is.

    Raises:
        ConfigError: a source or setting that streaming has no way for.
        DataError, ResourceError, IntegrityError: as for rows in memory.
    """
    findings: list[Issue] = []
    held, held_reading = held_out_elsewhere(data, recognise, findings)
    keys = {split: {fold(text) for text in part.placed().texts} for split, part in held.items()}
    held_keys = set().union(*keys.values())
    passed = _Passed(held_keys)
    limit = data.max_train_rows
    for table, reading in _tables(data, recognise):
        for bad in table.bad:
            passed.bad += 1
            if len(passed.places) < SHOWN:
                passed.places.append(f"{table.at(bad.line)}: {bad.reason}")
        passed.read += table.read
        passed.notes.update(dict.fromkeys(table.notes))
        passed.unused.update(table.unused)
        if table.read > len(table.bad):  # nothing can be said of a filter by rows that cannot be read
            now = set(table.unmatched)
            passed.unmatched = now if passed.unmatched is None else passed.unmatched & now
        for at in range(len(table) if limit is None else min(len(table), limit - passed.rows)):
            assert reading is not None
            passed.add(table, at, reading, [*parts, *reading.more_fields])
        held_reading = reading or held_reading
        if passed.rows == limit:
            break
    source = source_name(data.source)
    findings += form_notes(passed.notes)
    findings += apply_bad_row_policy(passed.bad, passed.places, passed.read, source, data.on_bad_row)
    if not passed.rows:
        raise DataError(
            f"{source} has no rows that can be used", where="data.train", hint="see `data.filter`, or give more rows"
        )
    findings += passed.findings(source, data)
    classes = None
    if held_reading is not None and held_reading.stratify is not None:
        classes = {"train": passed.classes}
        classes |= {split: Counter(part.placed().labels or ()) for split, part in held.items()}
    repeated = PlacedRows([text for text, _ in passed.met.values()], None, lambda at: list(passed.met.values())[at][1])
    rows = StreamedRows(data, recognise, passed.rows)
    formats = {split: part.reading for split, part in held.items() if len(part.indices)}
    if held_reading is not None:
        formats["train"] = held_reading  # of the training rows, which were read last
    return Streamed(rows, held, findings, classes, repeated, passed.digest.hexdigest(), formats)


class _Passed:
    """Counts of what has passed."""

    def __init__(self, held: set[str]) -> None:
        self.held = held
        self.rows = self.bad = self.read = self.repeats = self.torn = 0
        self.places: list[str] = []
        self.notes: dict[str, None] = {}
        self.repeat: tuple[str, str] | None = None
        self.conflict: str | None = None
        self.unmatched: set[str] | None = None
        self.classes: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.seen: dict[bytes, bytes] = {}
        self.met: dict[str, tuple[str, str]] = {}
        self.digest = hashlib.sha256()

    def add(self, table: Table, at: int, reading: RowFormat, parts: Sequence[str]) -> None:
        row = table.rows[at]
        text = reading.key_of(row)
        folded = fold(text)
        label = "" if reading.stratify is None else str(row[reading.stratify])
        self.rows += 1
        self.classes[label] += 1
        self.digest.update(json.dumps([row.get(part) for part in parts]).encode())
        self.missing.update(missing_in(row, reading.stratify))
        if folded in self.held and folded not in self.met:
            self.met[folded] = (text, table.where(at))
        key, own = _short_hash(folded), _short_hash(label)
        before = self.seen.get(key)
        if before is not None:
            self.repeats += 1
            self.repeat = self.repeat or (table.where(at), text)
            if before != own:
                self.torn += 1
                self.conflict = self.conflict or table.where(at)
        elif len(self.seen) < REMEMBERED:
            self.seen[key] = own

    def findings(self, source: str, data: DataSettings) -> list[Issue]:
        found = [
            Issue(
                "streamed",
                f"the {self.rows:,} training rows are read as they are needed: they are shuffled and grouped by length"
                f" within {data.buffer_rows:,} rows, and rows that are nearly those held out were not looked for",
                self.rows,
            )
        ]
        found += unused_columns(self.unused, source)
        found += missing_texts("train", self.missing, self.rows)
        if data.max_train_rows is not None and self.rows < data.max_train_rows:
            message = (
                f"there are {self.rows:,} training rows, fewer than the {data.max_train_rows:,} of `max_train_rows`"
            )
            found.append(Issue("fewer-rows", message, self.rows, hint="give more data, or ask for fewer rows"))
        if self.unmatched:
            message = f"no row of {source} has {', '.join(sorted(self.unmatched))}, which the filter asks for"
            found.append(Issue("filter-unmatched", message, 0, hint="check the spelling in `data.filter`"))
        looked = "" if len(self.seen) < REMEMBERED else f", of the first {REMEMBERED:,} texts"
        if self.repeat is not None:
            message = f"{self.repeats:,} of {self.rows:,} train rows repeat another row's text{looked}"
            place, text = self.repeat
            example = f"{place}: {' '.join(text.split())[:80]!r}"
            found.append(Issue("duplicates", message, self.repeats, example=example, hint="remove the repeats"))
        if self.torn:
            message = f"{self.torn:,} train rows have another class than an earlier row of the same text{looked}"
            found.append(
                Issue("conflicting-labels", message, self.torn, example=self.conflict, hint="decide for one class each")
            )
        return found


def _short_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _tables(data: DataSettings, recognise: Recognise) -> Iterator[tuple[Table, RowFormat | None]]:
    """Yield the rows in tables of at most `CHUNK`, read and named, with the bad rows beside them.

    The second item is the format of the rows, or None as long as there was no row to recognise it by.
    """
    columns: dict[str, None] = {}
    reading: RowFormat | None = None
    for file in _files(data.source):
        form, notes = form_of(data), list[str]()
        found = rows_of(file, columns, form, notes.append)
        while chunk := list(islice(found, CHUNK)):
            table = Table(
                source_name(data.source),
                str(file),
                [row for _, row in chunk if not isinstance(row, str)],
                [line for line, row in chunk if not isinstance(row, str)],
                [BadRow(line, row) for line, row in chunk if isinstance(row, str)],
                tuple(columns),
            )
            if reading is None and table.rows:
                reading = reading_of(table, data, recognise)
            if reading is not None:
                table = named(table, reading, data.columns, data.filter, whole=False)
            yield replace(table, read=len(chunk), notes=tuple(notes)), reading


def _files(source: Source) -> Iterator[Path]:
    """Yield the files of a source, in their order.

    Raises:
        ConfigError: a source that is not made of lines.
    """
    if isinstance(source, list):
        for each in source:
            yield from _files(each)
        return
    if isinstance(source, Pair):
        raise _not_streamed("two aligned files are", "write them as one .jsonl or .tsv file")
    if source.startswith(HUB_SCHEME) or is_hub_id(source):
        raise _not_streamed(f"{source} is", "download it and write it as .jsonl")
    path = locate(source) if (files := matching(source)) is None else None
    if path is not None:
        files = files_in(path, source)[0] if path.is_dir() else [path]
    for file in files or ():
        if kind_of(file) not in KINDS:
            raise _not_streamed(f"{file} is", "write it as .jsonl")
        yield file


def _not_streamed(what: str, hint: str) -> ConfigError:
    return ConfigError(
        f"{what} not read row by row; streaming reads {', '.join(KINDS)}, also compressed",
        where="data.train",
        hint=f"{hint}, or data.streaming=false",
    )


def rows_of(
    file: Path, columns: dict[str, None], form: TextForm, note: Callable[[str], None] = lambda text: None
) -> Found:
    """Yield the rows of a file that is made of lines, with the line of each; nothing that has passed is kept.

    Args:
        file: A file of one of `KINDS`.
        columns: Filled with the names of the columns.
        form: Settings of files of text.
        note: Told how the file is read, if otherwise than usual, before the first row.

    Raises:
        DataError: The file is UTF-16, or has no header.
        ResourceError: It may not be read.
    """
    kind = kind_of(file)
    with opened_text(file, form, "" if kind in USUAL else "\n") as (lines, found):
        for said in found.notes:
            note(said)
        fault = fault_in(found)
        if kind in USUAL:
            yield from delimited_rows(lines, found.delimiter, columns, fault=fault, file=str(file))
        elif kind == ".txt":
            yield from text_rows(lines, columns, documents=form.rows == "document", fault=fault)
        else:
            yield from jsonl_rows(lines, columns, fault=fault)


@contextmanager
def opened_text(file: Path, form: TextForm, newline: str) -> Iterator[tuple[io.TextIOWrapper, Recognised]]:
    """Open a file, expanded if it is compressed, to read its lines one after another.

    Args:
        file: The file; wrong bytes become lone surrogates.
        form: Settings of files of text.
        newline: As for `io.TextIOWrapper`.

    Raises:
        DataError: It is UTF-16, or not of the encoding that the settings name.
        ResourceError: It may not be read.
    """
    try:
        found = recognise_form(str(file), kind_of(file), form, lambda: pieces(file))
        with io.BufferedReader(Expanded(file)) as raw:
            yield io.TextIOWrapper(raw, encoding=found.encoding, errors="surrogateescape", newline=newline), found
    except PermissionError as error:
        raise ResourceError(f"{file} cannot be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not {error.encoding}: {error.reason}",
            where=str(file),
            hint="leave `data.encoding` out, or name the right one",
        ) from None
