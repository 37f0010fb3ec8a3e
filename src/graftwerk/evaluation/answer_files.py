"""Files of answers: csv, tsv, jsonl and parquet, each row with its own columns, its answer, and the reason if none.

A csv, tsv or jsonl file that was cut off anywhere, in the middle of a row as well, can be gone on with: its whole rows
are found by the form of the file alone.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graftwerk.data.parsers import MAX_FIELD_CHARACTERS
from graftwerk.data.row_source import Kind, RowSource
from graftwerk.errors import ConfigError, ResourceError
from graftwerk.evaluation.stream import Answered
from graftwerk.sanitize import as_json

REASON = "reason"
"""The column that says why a row has no answer."""
PREFIX = "predicted_"
"""Before a column of ours whose name a row has for a column of its own."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*DELIMITERS, ".jsonl", ".parquet")


@dataclass(frozen=True)
class Columns:
    """The columns of a file of answers.

    Attributes:
        own: Columns of the rows, as they are.
        answer: Column of each part of an answer, by the part's name.
        reason: The column of the reason.
        flat: True if the parts of a mapping are columns each.
    """

    own: tuple[str, ...]
    answer: Mapping[str, str]
    reason: str
    flat: bool

    @classmethod
    def of(cls, own: Sequence[str], answer: Mapping[str, Any], *, flat: bool) -> Columns:
        """Name the columns for answers like this one; a name that a row has already gets a prefix.

        Args:
            own: Columns of the rows.
            answer: Any answer.
            flat: As for the attribute.
        """
        taken = set(own)

        def free(name: str) -> str:
            while name in taken:
                name = PREFIX + name
            taken.add(name)
            return name

        parts = flattened(answer) if flat else answer
        return cls(tuple(own), {part: free(part) for part in parts}, free(REASON), flat)

    @property
    def names(self) -> tuple[str, ...]:
        """Return all columns in order."""
        return (*self.own, *self.answer.values(), self.reason)

    @property
    def note(self) -> str | None:
        """Return what is to be said about names that were taken, or None."""
        moved = [f"`{part}` is in `{name}`" for part, name in self.answer.items() if part != name]
        if self.reason != REASON:
            moved.append(f"`{REASON}` is in `{self.reason}`")
        if not moved:
            return None
        return f"the rows have columns of these names themselves: {', '.join(moved)}"

    def row(self, one: Answered) -> dict[str, Any]:
        """Return a row as it is written: own columns, the parts of its answer or None, and the reason or None."""
        parts = {} if one.answer is None else flattened(one.answer) if self.flat else one.answer
        return {
            **{name: one.row.cells.get(name) for name in self.own},
            **{name: parts.get(part) for part, name in self.answer.items()},
            self.reason: one.reason,
        }


def flattened(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with the parts of a mapping as parts of their own: ``scores`` of a, b as score_a, score_b."""
    parts: dict[str, Any] = {}
    for name, value in answer.items():
        if isinstance(value, Mapping):
            parts |= {f"{name.removesuffix('s')}_{inner}": each for inner, each in value.items()}
        else:
            parts[name] = value
    return parts


class AnswerFile(ABC):
    """A file that answers are written to, chunk by chunk.

    Args:
        path: The file.
        columns: Its columns.
        keep: Bytes of an existing file that stay, or None to begin anew.
    """

    def __init__(self, path: Path, columns: Columns, keep: int | None = None) -> None:
        self.path, self.columns = path, columns
        self._stream: IO[bytes] = open(path, "wb" if keep is None else "r+b")  # noqa: SIM115
        if keep is not None:
            self._stream.truncate(keep)
            self._stream.seek(keep)

    def write(self, answered: Sequence[Answered]) -> None:
        """Write rows; they are on their way to the disk when this returns."""
        self._stream.write("".join(self._line(self.columns.row(one)) for one in answered).encode("utf-8", "replace"))
        self._stream.flush()

    @abstractmethod
    def _line(self, row: Mapping[str, Any]) -> str:
        """Return a row as it stands in the file."""

    def close(self) -> None:
        """Close the file; whatever was written stays."""
        self._stream.close()


class DelimitedFile(AnswerFile):
    """csv or tsv: numbers as JSON has them, lists and mappings as JSON, an empty cell for nothing."""

    def __init__(self, path: Path, columns: Columns, keep: int | None = None) -> None:
        super().__init__(path, columns, keep)
        if keep is None:
            self._stream.write(self._cells(columns.names).encode("utf-8", "replace"))

    def _line(self, row: Mapping[str, Any]) -> str:
        return self._cells([as_cell(value) for value in row.values()])

    def _cells(self, cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter=DELIMITERS[self.path.suffix.lower()], lineterminator="\n").writerow(cells)
        return line.getvalue()


class JsonlFile(AnswerFile):
    """One JSON object a line."""

    def _line(self, row: Mapping[str, Any]) -> str:
        return json.dumps({name: as_json(value) for name, value in row.items()}, ensure_ascii=False) + "\n"


class ParquetFile(AnswerFile):
    """parquet, a row group per chunk; the file is whole once it is closed, also after a stop.

    Args:
        path: The file.
        columns: Its columns.
        source: It says what kind of values the rows' own columns hold.
        answer: Any answer, for the kinds of its parts.
    """

    def __init__(self, path: Path, columns: Columns, source: RowSource, answer: Mapping[str, Any]) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(path, columns)
        types: dict[Kind, Any] = {
            "whole number": pyarrow.int64(),
            "number": pyarrow.float64(),
            "true or false": pyarrow.bool_(),
        }
        own = source.schema
        named = {name: source.kinds.get(name, "text") for name in columns.own}
        fields = [
            own.field(name) if own is not None and name in own.names else (name, types.get(kind, pyarrow.string()))
            for name, kind in named.items()
        ]
        self._as_text = {name for name, kind in named.items() if kind == "JSON"} if own is None else set()
        for part, value in flattened(answer).items():
            number = isinstance(value, float)
            fields.append((columns.answer[part], pyarrow.float64() if number else pyarrow.string()))
            self._as_text |= set() if number or isinstance(value, str) else {columns.answer[part]}
        self._schema = pyarrow.schema([*fields, (columns.reason, pyarrow.string())])
        self._writer = pyarrow.parquet.ParquetWriter(self._stream, self._schema)

    def write(self, answered: Sequence[Answered]) -> None:
        import pyarrow

        rows = [self.columns.row(one) for one in answered]
        for row in rows:
            row.update({name: as_cell(row[name]) for name in self._as_text if row[name] is not None})
        self._writer.write_table(pyarrow.Table.from_pylist(rows, self._schema))

    def _line(self, row: Mapping[str, Any]) -> str:
        raise NotImplementedError("parquet has no lines")

    def close(self) -> None:
        self._writer.close()
        super().close()


def as_cell(value: Any) -> str:
    """Return a value of a row as a cell of text."""
    plain = as_json(value)
    return "" if plain is None else plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def open_answers(
    path: Path, columns: Columns, source: RowSource, answer: Mapping[str, Any], keep: int | None = None
) -> AnswerFile:
    """Open a file of answers by its ending.

    Raises:
        ResourceError: It cannot be written.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return ParquetFile(path, columns, source, answer)
        return (JsonlFile if path.suffix.lower() == ".jsonl" else DelimitedFile)(path, columns, keep)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}", where=str(path)) from None
    except ImportError:
        raise ResourceError(
            "writing parquet needs the package pyarrow", where=str(path), hint="pip install 'graftwerk[data]'"
        ) from None


def check_ending(path: Path) -> None:
    """Check that the ending of a file says a form that answers are written in.

    Raises:
        ConfigError: It does not.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"answers are not written to a file that ends in `{path.suffix}`",
            where=str(path),
            hint=f"its ending says the form: {', '.join(ENDINGS)}",
        )


# -- going on with a file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """One whole row of a file of answers: its values by column, and the byte after it."""

    row: dict[str, Any]
    end: int


def written_rows(path: Path) -> Iterator[Written]:
    """Yield the whole rows of a csv, tsv or jsonl file of answers; what is cut off at its end is not one of them.

    The first item of a csv or tsv file is its header, with None for every value.

    Raises:
        ConfigError: A row is not of the form of the file.
    """
    if path.suffix.lower() == ".jsonl":
        yield from _written_lines(path)
        return
    delimiter, header = DELIMITERS[path.suffix.lower()], None
    for record, end in _records(path):
        limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            cells = next(csv.reader(io.StringIO(record, newline=""), delimiter=delimiter), [])
        finally:
            csv.field_size_limit(limit)
        if header is None:
            header = cells
            yield Written(dict.fromkeys(header), end)
        elif len(cells) != len(header):
            raise _foreign(path, end)
        else:
            yield Written(dict(zip(header, cells, strict=True)), end)


def _written_lines(path: Path) -> Iterator[Written]:
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                raise _foreign(path, end) from None
            if not isinstance(row, dict):
                raise _foreign(path, end)
            yield Written(row, end)


def _records(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each whole record and the byte after it: a line feed ends one where all quotes are closed."""
    held, quotes, end = bytearray(), 0, 0
    with path.open("rb") as file:
        for line in file:
            held += line
            quotes += line.count(b'"')
            if quotes % 2 == 0 and line.endswith(b"\n"):
                end += len(held)
                yield held.decode("utf-8", "replace"), end
                held.clear()


def _foreign(path: Path, end: int) -> ConfigError:
    return ConfigError(
        f"{path} is not a file of answers that can be gone on with (byte {end:,})",
        where=str(path),
        hint="--overwrite (overwrite=True) starts it over; or name another file",
    )
