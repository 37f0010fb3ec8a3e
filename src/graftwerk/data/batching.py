"""Batching by length: rows of similar length share a batch, so that little of it is padding."""

from __future__ import annotations

import random
from collections.abc import Sequence

POOL = 64
"""Batches' worth of rows that are sorted together. All rows at once would make nearly the same batches every epoch; a
pool this large leaves a few per cent of padding."""


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch, grouped by length.

    Rows are shuffled, cut into pools, sorted by length within their pool and cut into batches; then the batches are
    shuffled. The batch with the longest row comes first: a run that does not fit into memory says so at once.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch; the last of an epoch may have fewer.
        seed: Seed of the run.
        epoch: Number of the epoch. The result depends on the four arguments and on nothing else.

    Returns:
        Lists of indices into ``lengths``; every index stands in exactly one of them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    draw = random.Random(f"batches {seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda index: lengths[index])
        # The incomplete batch sits at a random height of the sorted pool, or it would always hold the longest rows.
        rest = len(pool) % batch_size
        cut = draw.randrange(len(pool) // batch_size + 1) * batch_size if rest else 0
        pieces = [pool[:cut], pool[cut : cut + rest], pool[cut + rest :]]
        for piece in pieces:
            batches.extend(piece[at : at + batch_size] for at in range(0, len(piece), batch_size))
    draw.shuffle(batches)
    longest = max(range(len(batches)), key=lambda at: max(lengths[index] for index in batches[at]), default=0)
    return batches[longest : longest + 1] + batches[:longest] + batches[longest + 1 :]


def shuffled(rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch without regard to length; otherwise like `length_grouped`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = list(range(rows))
    random.Random(f"batches {seed} {epoch}").shuffle(order)
    return [order[at : at + batch_size] for at in range(0, rows, batch_size)]
