"""Which rows go into which step, micro-batch and process: pure functions of lengths, seed and epoch.

A step's rows are drawn first, and only then cut into micro-batches and shared among processes. So a step is the same
set of rows whether it is worked off as (batch 8, accumulation 1), as (4, 2), or by two processes of 4, and resuming
in the middle of an epoch needs nothing but the step's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftwerk.data.batching import length_grouped, shuffled


def epoch_order(
    lengths: Sequence[int],
    rows_per_step: int,
    *,
    seed: int,
    epoch: int,
    group: bool,
    drawn: Sequence[int] | None = None,
) -> list[list[int]]:
    """The rows of each step of one epoch; only the last or one other step may be smaller.

    Args:
        lengths: Tokens of each row.
        drawn: The rows of this epoch, where not every row comes once; a row may come more than once.
        rows_per_step: Over all processes and micro-batches.
        group: Rows of like length together; otherwise a plain shuffle.
    """
    if drawn is not None:
        places = epoch_order([lengths[row] for row in drawn], rows_per_step, seed=seed, epoch=epoch, group=group)
        return [[drawn[place] for place in step] for step in places]
    if group:
        return length_grouped(lengths, rows_per_step, seed, epoch)
    return shuffled(len(lengths), rows_per_step, seed, epoch)


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], micro: int, *, processes: int = 1, process: int = 0
) -> list[list[int]]:
    """One process's share of a step, as micro-batches of at most ``micro`` rows.

    The step's rows are sorted by length and cut into equal pieces, dealt out so that processes working at the same
    time have pieces of like length. All processes get the same number of pieces; in a step with fewer rows than
    pieces some are empty.
    """
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    rounds = math.ceil(len(ordered) / (micro * processes))
    pieces = rounds * processes
    size, larger = divmod(len(ordered), pieces)
    cuts = [0]
    for piece in range(pieces):
        cuts.append(cuts[-1] + size + (piece < larger))
    return [ordered[cuts[piece] : cuts[piece + 1]] for piece in range(process, pieces, processes)]
