"""Training rows that are encoded during training (`data.streaming`): a part of them at a time, in the files' order.

The rows of a step are a pure function of its number, as for rows in memory: the examples are cut into parts of a
fixed size, and each part has an order of its own. Resuming in the middle means reading again up to there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, overload

from graftwerk.data.stream import CHUNK, StreamedRows
from graftwerk.errors import DataError
from graftwerk.tasks.base import Example, Splits, Task
from graftwerk.tasks.example_checks import Noted, note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedStream(Sequence[Example]):
    """Examples of streamed rows; building it encodes all rows once to count them, and stores none.

    Args:
        task: Task that encodes the rows.
        rows: The streamed rows.
        tokenizer: Tokenizer of the model.
        splits: Splits with the label names.
        max_length: Most tokens of a row.
        buffer_rows: Examples in memory at a time (`data.buffer_rows`).
    """

    def __init__(
        self,
        task: Task,
        rows: StreamedRows,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        max_length: int,
        buffer_rows: int,
    ) -> None:
        self._task, self._rows, self._tokenizer, self._splits = task, rows, tokenizer, splits
        self._max_length, self._buffer_rows = max_length, buffer_rows
        self._first, self._held = 0, list[Example]()
        self._coming: Iterator[Example] = iter(())
        self._next = -1
        self.cut = self.tokens_cut = self._count = 0
        self.lengths_counted: Counter[int] = Counter()
        """Number of examples by their number of tokens, cut-off tokens included."""
        self.classes: Counter[int] = Counter()
        """Number of examples by class, if targets are classes."""
        self.notes: dict[str, Noted] = {}
        for at, example in enumerate(self):
            self._count += 1
            self.cut += bool(example.truncated)
            self.tokens_cut += example.truncated
            self.lengths_counted[example.length + example.truncated] += 1
            if isinstance(example.target, int):
                self.classes[example.target] += 1
            note(self.notes, at, example, task)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        """Yield all examples, read and encoded anew."""
        rows = iter(self._rows)
        while chunk := list(islice(rows, CHUNK)):
            yield from self._task.encode(chunk, self._tokenizer, self._splits, self._max_length)

    def part_steps(self, rows_per_step: int) -> int:
        """Return the number of steps whose rows are in memory together, at least 1."""
        return max(1, self._buffer_rows // rows_per_step)

    def hold(self, first: int, last: int) -> list[Example]:
        """Load examples into memory, in place of those that were there.

        Returns:
            The examples.

        Raises:
            DataError: The files have fewer rows than before.
        """
        if (self._first, len(self._held)) != (first, last - first):
            if self._next != first:
                self._coming, self._next = islice(self, first, None), first
            self._held = []  # not both parts at once
            self._first, self._held = first, list(islice(self._coming, last - first))
            self._next = first + len(self._held)
            if self._next != last:
                raise DataError("there are fewer rows than were counted: the files have changed", where="data.train")
        return self._held

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example in memory.

        Raises:
            IndexError: It is not in memory.
        """
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._count))]
        if not 0 <= index - self._first < len(self._held):
            raise IndexError(f"row {index} is not in memory")
        return self._held[index - self._first]


class LengthsHeld(Sequence[int]):
    """Tokens of each example in memory, by its number among all."""

    def __init__(self, stream: EncodedStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [example.length for example in self._stream[index]]
        return self._stream[index].length
