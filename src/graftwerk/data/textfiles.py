"""Plain text as rows: one a line or one a document, and pairs of files whose lines belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from graftwerk.data.rows import BadRow, Table
from graftwerk.errors import DataError

TextRows = Literal["line", "document"]


def fill_text(text: str, table: Table, rows: TextRows, fault: Callable[[str], str | None]) -> None:
    """Put the rows of a text into ``table``: the lines that are not blank, or what stands between blank lines.

    Args:
        fault: What is wrong with the characters of a row, if anything is.
    """
    table.columns = ("text",)
    pieces = _lines(text) if rows == "line" else _documents(text)
    for line, piece in pieces:
        reason = fault(piece)
        if reason is None:
            table.rows.append({"text": piece})
            table.lines.append(line)
        else:
            table.bad.append(BadRow(line, reason))


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip()]


def _documents(text: str) -> list[tuple[int, str]]:
    found: list[tuple[int, list[str]]] = []
    blank = True
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            if blank:
                found.append((number, []))
            found[-1][1].append(line)
        blank = not line.strip()
    return [(number, "\n".join(lines)) for number, lines in found]


def split_lines(text: str) -> list[str]:
    """Lines as other programs count them: ended by a line feed alone, a carriage return before it left out. What
    `str.splitlines` also breaks at (form feeds, U+2028) would shift one side of a pair against the other.
    """
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def pair_lines(source: tuple[Path, str], target: tuple[Path, str], table: Table) -> None:
    """Rows with `source` and `target` from the lines of two files; a line that is empty on one side is for the reader
    of the part to refuse, at its place.

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
            mend="give two files of the same number of lines, line n of one the translation of line n of the other",
        )
    table.columns = ("source", "target")
    for line, (one, other) in enumerate(zip(sources, targets, strict=True), start=1):
        table.rows.append({"source": one, "target": other})
        table.lines.append(line)
