"""From a source to the rows a task understands: read, filter, name the parts, and hold on to every line number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from graftwerk.data.compressed import OPENERS
from graftwerk.data.fields import Part
from graftwerk.data.files import READERS, read_file, read_pair, refuse_form
from graftwerk.data.rows import BadRow, Table, joined
from graftwerk.data.settings import Pair, Source, source_name
from graftwerk.data.text_form import RECOGNISE, TextForm
from graftwerk.errors import ConfigError, DataError, did_you_mean
from graftwerk.resource_paths import PACKAGE_SCHEME, locate

HUB_SCHEME = "hub://"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", re.ASCII)

Scalar = str | int | float | bool
Filter = Mapping[str, Scalar | list[Scalar]]


TASKS_BY_COLUMNS: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(parts.split()), task)
    for parts, task in (
        ("tokens tags", "token-classification"),
        ("text spans", "token-classification"),
        ("anchor positive", "similarity"),
        ("text text_pair score", "similarity, or regression"),
        ("text labels", "multilabel"),
        ("text score", "regression"),
        ("text label", "classification"),
        ("document summary", "summarization"),
        ("source target", "translation"),
        ("messages", "instruction"),
        ("instruction output", "instruction"),
    )
)
"""The columns that only one task has, for messages to somebody who named another."""


def name_parts(
    table: Table,
    *,
    parts: Mapping[str, Part],
    optional: Mapping[str, Part] | None = None,
    columns: Mapping[str, str] | None = None,
    filter: Filter | None = None,
    whole: bool = True,
) -> Table:
    """Return the rows of a table that pass the filter, with columns renamed to the fields that the task reads.

    No row is dropped silently: one that cannot be used is in ``bad`` with its line and reason; `resolve_bad_rows`
    raises for them or counts them.

    Args:
        table: Rows as they were read; not changed.
        parts: What a row must have, each with the reader of its value.
        optional: Parts that are taken where their column exists.
        columns: Which column plays which part; a part not named here is its own column.
        filter: Keep rows whose column has this value, or one of these; as numbers where both are numbers, else as text.
        whole: True if the table holds all rows of the source, so that it is an error if none passes.

    Raises:
        ConfigError: A column or field does not exist.
        DataError: No row passes the filter, and ``whole`` is True.
    """
    columns, filter, optional = columns or {}, filter or {}, optional or {}
    _check_parts(columns, [*parts, *optional])
    _check_columns(table, {part: columns.get(part, part) for part in parts}, "columns")
    _check_columns(table, {part: columns[part] for part in optional if part in columns}, "columns")
    _check_columns(table, {column: column for column in filter}, "filter")
    wanted = {column: values if isinstance(values, list) else [values] for column, values in filter.items()}
    readers = {part: (columns.get(part, part), read) for part, read in {**parts, **optional}.items()}
    present = set(table.columns)
    readers = {part: pair for part, pair in readers.items() if part in parts or pair[0] in present}

    result = replace(table, rows=[], lines=[], bad=list(table.bad))
    met: set[tuple[str, int]] = set()
    for line, row in zip(table.lines, table.rows, strict=True):
        try:
            if not _passes(row, wanted, met):
                continue
            result.rows.append(
                {
                    part: _part(row, column, read)
                    for part, (column, read) in readers.items()
                    if part in parts or column in row
                }
            )
        except ValueError as error:
            result.bad.append(BadRow(line, str(error)))
        else:
            result.lines.append(line)
    if whole and wanted and table.rows and not result.rows and len(result.bad) == len(table.bad):
        raise DataError(_nothing_passes(table, wanted), where="data.filter")
    values = [(column, at, value) for column, listed in wanted.items() for at, value in enumerate(listed)]
    result.unmatched = tuple(f"{column}: {value}" for column, at, value in values if (column, at) not in met)
    return result


def read_source(source: Source, split: str = "train", form: TextForm = RECOGNISE) -> Table:
    """Read all rows of a source under the names of their columns, without filter.

    Args:
        source: A path, ``pkg://package/inner/path``, or ``owner/name[/configuration][:split]`` of the hub, with or
            without ``hub://`` in front; also a list of sources, or a pair of files whose lines belong together.
        split: For a hub id that names none: which of its splits.
        form: Settings of files of text.

    Raises:
        ConfigError: There is no such source, or a list of sources is empty.
        DataError: The source as a whole cannot be read.
        ResourceError: No network, missing package or permission.
    """
    if isinstance(source, Pair):
        return read_pair(locate(source.source), locate(source.target), source_name(source), form)
    if isinstance(source, list):
        if not source:
            raise ConfigError("a list of sources names none", where="data.train")
        return joined([read_source(each, split, form) for each in source], source_name(source), source_name(source))
    if source.startswith(HUB_SCHEME) or is_hub_id(source):
        from graftwerk.data.hub import read_hub

        refuse_form(form, Path(source))

        name, _, own_split = source.removeprefix(HUB_SCHEME).partition(":")
        return read_hub(name, own_split or split, source)
    files = matching(source)
    if files is not None:
        return joined([read_file(file, source, form) for file in files], source, source)
    return read_file(locate(source), source, form)


def files_of(source: Source) -> list[Path] | None:
    """Return every file that `read_source` looks at, in its order, or None if some data set is of the hub.

    Raises:
        ConfigError, ResourceError: as for `read_source`.
    """
    if isinstance(source, Pair):
        return [locate(source.source), locate(source.target)]
    if isinstance(source, list):
        each = [files_of(part) for part in source]
        return None if None in each else [file for files in each if files is not None for file in files]
    if source.startswith(HUB_SCHEME) or is_hub_id(source):
        return None
    listed = matching(source)
    files: list[Path] = []
    for place in [locate(source)] if listed is None else listed:
        files += sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    return files


def matching(source: str) -> list[Path] | None:
    """Return the files that match a glob pattern, sorted, or None if it is no pattern or a file has that very name.

    Raises:
        ConfigError: No file matches.
    """
    if not any(mark in source for mark in "*?[") or source.startswith(PACKAGE_SCHEME) or Path(source).exists():
        return None
    found = sorted(Path(name) for name in glob(str(Path(source).expanduser()), recursive=True) if Path(name).is_file())
    if not found:
        raise ConfigError(
            f"no file matches the pattern {source}", hint="* stands for any part of a name, ** for folders"
        )
    return found


def is_hub_id(source: str) -> bool:
    """Return True for `owner/name`, perhaps with configuration and split, unless it is a file or ends like one."""
    if source.startswith((PACKAGE_SCHEME, ".", "~")) or not _HUB_ID.fullmatch(source):
        return False
    if source.lower().endswith((*READERS, *OPENERS)):
        return False
    return not Path(source).exists()


def _part(row: Mapping[str, Any], column: str, read: Part) -> Any:
    if column not in row:
        raise ValueError(f"`{column}` is missing")
    try:
        return read(row[column])
    except ValueError as error:
        raise ValueError(f"`{column}` {error}") from None


def _check_parts(columns: Mapping[str, str], known: Iterable[str]) -> None:
    known = list(known)
    for part in columns:
        if part not in known:
            raise ConfigError(
                f"this task has no part `{part}`",
                where=f"data.columns.{part}",
                hint=did_you_mean(part, known, f"Its parts: {', '.join(known)}"),
            )


def _check_columns(table: Table, wanted: Mapping[str, str], key: str) -> None:
    """Raise ConfigError if a wanted column exists in no row: a mistake in the run file, not in the rows.

    Raises:
        ConfigError: a column does not exist; the nearest name is given.
    """
    if not table.columns and not table.rows:
        return  # an empty file, or bad rows only: said elsewhere
    for part, column in wanted.items():
        if column not in table.columns:
            other = "`data.filter=null` takes the filter away"
            if key == "columns":
                other = f"`data.columns: {{{part}: ...}}` names the right one (`--column {part}=...` after a training)"
            listed = f"It has: {', '.join(table.columns)}; {other}"
            if len(table.columns) == 1 and any(mark in table.columns[0] for mark in ",;\t|"):
                hint = f"the fields are not separated by what stands between them: `data.delimiter` names it. {listed}"
            elif key == "columns" and (task := task_of(table.columns, wanted)) is not None:
                hint = f"these columns are those of another task: task={task}. {listed}"
            else:
                hint = did_you_mean(column, table.columns, listed)
            raise ConfigError(f"{table.source} has no column `{column}`", where=f"data.{key}", hint=hint)


def task_of(columns: Collection[str], wanted: Collection[str]) -> str | None:
    """Return the task whose rows have these columns, or None if none is sure or it is the one with the wanted parts."""
    found = next(((parts, task) for parts, task in TASKS_BY_COLUMNS if parts <= set(columns)), None)
    return None if found is None or found[0] <= set(wanted) else found[1]


def _passes(row: Mapping[str, Any], wanted: Mapping[str, list[Scalar]], met: set[tuple[str, int]]) -> bool:
    """Return True if a row has a wanted value in every filtered column, and add the values found to ``met``."""
    for column, values in wanted.items():
        if column not in row:
            raise ValueError(f"`{column}` is missing, by which rows are filtered")
        at = next((at for at, value in enumerate(values) if _same(row[column], value)), None)
        if at is None:
            return False
        met.add((column, at))
    return True


def _same(cell: Any, value: Scalar) -> bool:
    """Return True if a cell (text, in a csv file) equals the value in the run file."""
    if cell is None or isinstance(cell, list | dict):
        return False
    if isinstance(value, bool) or isinstance(cell, bool):
        return str(cell).strip().casefold() == str(value).strip().casefold()
    if isinstance(value, int | float):
        try:
            return float(cell) == float(value)
        except ValueError:
            return False
    return str(cell) == value


def _nothing_passes(table: Table, wanted: Mapping[str, list[Scalar]]) -> str:
    column, values = next(iter(wanted.items()))
    seen = Counter(str(row.get(column)) for row in table.rows).most_common(5)
    held = ", ".join(f"{name!r:.60} ({count:,})" for name, count in seen)
    return (
        f"no row of {table.source} passes the filter {dict(wanted)};"
        f" the most frequent values of `{column}`: {held}, wanted: {values}"
    )
