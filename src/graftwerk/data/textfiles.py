"""Pairs of files of plain text whose lines belong together."""

from __future__ import annotations

from pathlib import Path

from graftwerk.data.parsers import bare
from graftwerk.data.rows import Table
from graftwerk.errors import DataError


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
