"""Rows out of lines of text, one after another: jsonl, csv, tsv, plain text. Nothing of what has passed is kept.

The same readers serve a file that is in memory and one that is read while it is trained on.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graftwerk.errors import DataError

MAX_FIELD_CHARACTERS = 1 << 27
"""The csv module's own limit (131,072) is below a long document."""

Found = Iterator[tuple[int, dict[str, Any] | str]]
"""The line on which a row begins, from 1; and the row, or what is wrong with it."""
Fault = Callable[[str], str | None]
"""What is wrong with the characters of a text, if anything is."""


def bad_characters(text: str) -> str | None:
    """Return what is wrong with the characters of a text, or None if they are valid."""
    if "\0" in text:
        return "holds a NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not UTF-8 (byte 0x{ord(text[error.start]) - 0xDC00:02x})"
    return None


def no_fault(text: str) -> None:
    """Return None for every text: the characters have been checked already."""


# csv and tsv


def delimited_rows(lines: Iterable[str], delimiter: str, columns: dict[str, None], *, fault: Fault, file: str) -> Found:
    """Parse csv or tsv lines to rows.

    Args:
        lines: Lines with their ends, which are not translated.
        delimiter: The character between fields.
        columns: Filled with the names of the columns.
        fault: Function from a field to what is wrong with its characters, or to None.
        file: For messages.

    Raises:
        DataError: no header, or one with a column twice.
    """
    header: list[str] | None = None
    for line, cells in _records(iter(lines), delimiter):
        if isinstance(cells, str):
            yield line, cells
            continue
        if not cells or (header is None and cells == ["sep=", ""]):  # an empty line, or Excel's note of the delimiter
            continue
        reason = next(filter(None, map(fault, cells)), None)
        if header is None:
            header = _header(cells, reason, f"{file}:{line}")
            columns.update(dict.fromkeys(header))
        elif reason is not None:
            yield line, reason
        elif len(cells) != len(header):
            yield line, f"has {len(cells)} fields where the header has {len(header)}"
        else:
            yield line, dict(zip(header, cells, strict=True))
    if header is None:
        raise DataError(
            "the file is empty: not even a header", where=file, hint="its first line names the columns: text,label"
        )


def _header(cells: list[str], reason: str | None, where: str) -> list[str]:
    if reason is not None:
        raise DataError(
            f"the header {reason}",
            where=where,
            hint="is it text? `data.encoding` names its encoding; a spreadsheet saves one as CSV (UTF-8)",
        )
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"the header has the column `{twice[0]}` more than once", where=where, hint="rename one of them in the file"
        )
    return names


def _records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (first line, cells) of each record; after broken quoting, resume at the line after its first."""
    again: deque[str] = deque()
    taken: list[str] = []
    before = 0

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    while True:
        reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        while True:
            limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # one setting for the whole process
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = f"broken quoting ({error})"
                break
            finally:
                csv.field_size_limit(limit)
            if cells is None:
                return
            yield before + 1, cells
            before += len(taken)
            taken.clear()
        yield before + 1, reason
        again.extendleft(reversed(taken[1:]))
        before += 1
        taken.clear()


# jsonl


def jsonl_rows(lines: Iterable[str], columns: dict[str, None], *, fault: Fault) -> Found:
    """Parse lines of JSON objects to rows.

    Args:
        lines: Ended by line feeds alone, with them or without.
        columns: Filled with the keys of the objects.
        fault: Function from a line to what is wrong with its characters, or to None.
    """
    for line, raw in enumerate(lines, start=1):
        if not raw or raw.isspace():
            continue
        reason = fault(raw)
        row: Any = None
        if reason is None:
            row, reason = _object(raw.removesuffix("\n"))
        if reason is None:
            columns.update(dict.fromkeys(row))
        yield line, row if reason is None else reason


def _object(raw: str) -> tuple[Any, str | None]:
    """Return the JSON object in ``raw``, or the reason why there is none."""
    try:
        value = DECODER.decode(raw)
    except json.JSONDecodeError as error:
        return None, f"broken JSON ({error.msg}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"broken JSON ({error})"
    return (value, None) if isinstance(value, dict) else (None, f"is {json_kind(value)}, not an object")


def json_kind(value: Any) -> str:
    """Return the name of a JSON value's type, for a message."""
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


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


# text


def text_rows(lines: Iterable[str], columns: dict[str, None], *, documents: bool, fault: Fault) -> Found:
    """Yield the lines that are not blank, or the documents between blank lines.

    Args:
        lines: Ended by line feeds alone, with them or without.
        columns: Filled with the one column, ``text``.
        documents: True for documents, False for lines.
        fault: Function from a text to what is wrong with its characters, or to None.
    """
    columns["text"] = None
    for line, text in _documents(lines) if documents else _lines(lines):
        reason = fault(text)
        yield line, {"text": text} if reason is None else reason


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, bare(line)


def _documents(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    first, held = 0, list[str]()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            first = first if held else number
            held.append(bare(line))
        elif held:
            yield first, "\n".join(held)
            held.clear()
    if held:
        yield first, "\n".join(held)


def bare(line: str) -> str:
    """Return a line without its end.

    A line ends at a line feed alone, a carriage return before it left out: what `str.splitlines` also breaks at (form
    feeds, U+2028) would shift one side of a pair against the other.
    """
    return line.removesuffix("\n").removesuffix("\r")


# words and tags, one word a line


def conll_rows(lines: Iterable[str], columns: dict[str, None], *, fault: Fault) -> Found:
    """Yield the sentences of a CoNLL file: a word a line, its tag in the last field, a blank line between sentences.

    Args:
        lines: Ended by line feeds alone, with them or without. Fields are separated by tabs or blanks; lines that begin
            with `-DOCSTART-` are left out.
        columns: Filled with ``tokens``, and ``tags`` if any word has one.
        fault: Function from a text to what is wrong with its characters, or to None.
    """
    columns["tokens"] = None
    for first, sentence in _documents(line for line in lines):
        rows = [line.split("\t") if "\t" in line else line.split() for line in sentence.split("\n")]
        rows = [fields for fields in rows if not fields[0].startswith("-DOCSTART-")]
        if not rows:
            continue
        reason = fault(sentence)
        widths = {len(fields) for fields in rows}
        if reason is None and len(widths) > 1:
            reason = f"has a sentence with {' and '.join(map(str, sorted(widths)))} fields a line"
        row = {"tokens": [fields[0].strip() for fields in rows]}
        if widths != {1}:
            columns["tags"] = None
            row["tags"] = [fields[-1].strip() for fields in rows]
        yield first, row if reason is None else reason
