"""Assignment of rows to steps, micro-batches and processes: pure functions of lengths, seed and epoch.

A step's rows are drawn first, and only then cut into micro-batches and shared among processes. So a step is the same
set of rows whether it is computed as (batch 8, accumulation 1), as (4, 2), or by two processes of 4, and resuming
in the middle of an epoch needs nothing but the step's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftwerk.data.batching import length_grouped, shuffled
from graftwerk.data.mixture import Sampler
from graftwerk.tasks.base import Example
from graftwerk.training.stream import EncodedStream, LengthsHeld


def epoch_order(
    lengths: Sequence[int],
    rows_per_step: int,
    *,
    seed: int,
    epoch: int,
    group: bool,
    drawn: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the rows of each step of one epoch; only the last or one other step may be smaller.

    Args:
        lengths: Tokens of each row.
        rows_per_step: Rows of a step, over all processes and micro-batches.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        group: Put rows of similar length together; otherwise shuffle plainly.
        drawn: Rows of this epoch if it does not take every row once; a row may come more than once.
    """
    if drawn is not None:
        places = epoch_order([lengths[row] for row in drawn], rows_per_step, seed=seed, epoch=epoch, group=group)
        return [[drawn[place] for place in step] for step in places]
    if group:
        return length_grouped(lengths, rows_per_step, seed, epoch)
    return shuffled(len(lengths), rows_per_step, seed, epoch)


class BatchSampler:
    """Return the rows of each step of a training, a pure function of the step's number.

    An epoch is one part, or with streamed rows as many as `data.buffer_rows` makes of it; each part has an order of its
    own, and its rows are the ones in memory while its steps are taken.

    Args:
        examples: Encoded training rows.
        rows_per_step: Rows of a step, over all processes and micro-batches.
        seed: Seed of the run.
        group: Put rows of similar length together.
        draw: Sampler of each epoch's rows, for several data sets, or None to take every row once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        rows_per_step: int,
        *,
        seed: int,
        group: bool,
        draw: Sampler | None = None,
    ) -> None:
        self.examples, self.rows_per_step, self.draw = examples, rows_per_step, draw
        self._seed, self._group = seed, group
        self.steps_per_epoch = math.ceil(len(examples) / rows_per_step)
        self.lengths: Sequence[int]
        """Tokens of each row, or of each row in memory if rows are streamed."""
        if isinstance(examples, EncodedStream):
            self._part_steps, self.lengths = examples.part_steps(rows_per_step), LengthsHeld(examples)
            self.longest = max(examples.lengths_counted)
        else:
            self._part_steps, self.lengths = self.steps_per_epoch, [example.length for example in examples]
            self.longest = max(self.lengths, default=1)
        self._order: tuple[int, list[list[int]]] = (-1, [])
        """The part whose steps are laid out, and the rows of each."""

    def __call__(self, step: int) -> list[int]:
        """Return the rows of a step."""
        epoch, at, position, part = self._position(step)
        if self._order[0] != part:
            drawn = None if self.draw is None else self.draw(epoch)
            first = at * self._part_steps * self.rows_per_step
            lengths = [example.length for example in self.part(first)]
            steps = epoch_order(
                lengths, self.rows_per_step, seed=self._seed, epoch=part, group=self._group, drawn=drawn
            )
            self._order = (part, [[first + row for row in rows] for rows in steps])
        return self._order[1][position]

    def has_in_memory(self, step: int) -> bool:
        """Return True if the rows of a step can be had without letting go of those that are in memory now."""
        return not isinstance(self.examples, EncodedStream) or self._position(step)[3] == self._order[0]

    def _position(self, step: int) -> tuple[int, int, int, int]:
        """Return the epoch of a step, the part within it, the step within the part, and the part's number of all."""
        epoch, position = divmod(step, self.steps_per_epoch)
        at, position = divmod(position, self._part_steps)
        return epoch, at, position, epoch * math.ceil(self.steps_per_epoch / self._part_steps) + at

    def part(self, first: int) -> Sequence[Example]:
        """Load the part that begins with row ``first`` into memory, and return its rows."""
        if not isinstance(self.examples, EncodedStream):
            return self.examples
        return self.examples.hold(first, min(len(self.examples), first + self._part_steps * self.rows_per_step))


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    micro: int,
    *,
    tokens: int | None = None,
    processes: int = 1,
    process: int = 0,
) -> list[list[int]]:
    """Return one process's share of a step, as micro-batches of at most ``micro`` rows.

    The step's rows are sorted by length and cut into equal pieces, dealt out so that processes working at the same
    time have pieces of similar length. All processes get the same number of pieces; in a step with fewer rows than
    pieces some are empty.

    Args:
        rows: Rows of the step.
        lengths: Tokens of each row.
        micro: Most rows of a micro-batch.
        tokens: Most tokens of a micro-batch, padding included, or None for any number. Pieces are then cut at steps
            in length instead of equally; a row with more tokens is alone.
        processes: Number of processes.
        process: Rank of this process.
    """
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    if tokens is not None:
        pieces_of = _cut_by_tokens(ordered, lengths, micro, tokens)
        pieces_of += [[]] * (-len(pieces_of) % processes)
        return pieces_of[process::processes]
    rounds = math.ceil(len(ordered) / (micro * processes))
    pieces = rounds * processes
    size, larger = divmod(len(ordered), pieces)
    cuts = [0]
    for piece in range(pieces):
        cuts.append(cuts[-1] + size + (piece < larger))
    return [ordered[cuts[piece] : cuts[piece + 1]] for piece in range(process, pieces, processes)]


def _cut_by_tokens(ordered: Sequence[int], lengths: Sequence[int], micro: int, tokens: int) -> list[list[int]]:
    """Return as few pieces as the bounds allow, and among those the ones with the least padding.

    Args:
        ordered: Rows by length, shortest first.
        lengths: Tokens of each row of the data.
        micro: Most rows of a piece.
        tokens: Most tokens of a piece, padding included; a longer row is alone.
    """
    # best[j]: pieces and padded tokens of the first j rows, and where the last of the pieces begins
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(ordered) + 1):
        longest = lengths[ordered[end - 1]]
        first = max(0, end - max(1, min(micro, tokens // longest)))
        best.append(min((best[at][0] + 1, best[at][1] + longest * (end - at), at) for at in range(first, end)))
    cut: list[list[int]] = []
    end = len(ordered)
    while end:
        cut.append(list(ordered[best[end][2] : end]))
        end = best[end][2]
    return cut[::-1]
