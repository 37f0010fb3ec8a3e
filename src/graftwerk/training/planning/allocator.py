"""Memory that an allocator holds for a series of allocations: freed blocks are kept, split and rounded.

On a CPU the series is replayed through the C library's own allocator (`malloc_replay`). On CUDA torch's caching
allocator is modelled: requests rounded to 512 bytes, small ones (at most 1 MiB) cut from segments of 2 MiB, larger ones
below 10 MiB from segments of 20 MiB, the others given segments of their own, rounded to 2 MiB; a free block is split,
and joined with its free neighbours when it is freed (c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

from graftwerk.training.planning.step_trace import StepTrace

MIB = 1 << 20
STEPS, AFTERWARDS = 6, 3
"""Most steps that are replayed before the first evaluation and after it: gaps between blocks soon stop growing."""
PRODUCT = 700_000
"""Bytes that oneDNN keeps for a matrix product in bfloat16, whatever its size (measured with AMX: .5 to .9 MB)."""
REPLAYS = 5
"""Replays whose mean counts."""
ROUND, SMALL, SMALL_SEGMENT, LARGE_BELOW, LARGE_SEGMENT, ROUND_LARGE = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(frozen=True)
class Series:
    """Allocations of a run in their order.

    Attributes:
        events: For each allocation its size in bytes; for each end minus the number (from 1) of the allocation.
        recorded: For each allocation 1 if autograd recorded the operation that made it, else 0.
        trims: Places in ``events`` before which freed memory is given back to the system: the first of the steps
            after the activation cache was filled, and the first of the evaluation.
    """

    events: array[int]
    recorded: bytes
    trims: tuple[int, ...]


def repeated(trace: StepTrace, before_evaluation: int, after: int | None) -> Series:
    """Return the allocations of a run of equal steps, of which no more than tell something.

    Args:
        trace: A step. The model as it is loaded takes no bytes here: it is mapped from its file.
        before_evaluation: Steps before the first evaluation.
        after: Steps after it, or None if nothing is evaluated.
    """
    events, before = array("q"), 0
    for event in trace.events[: trace.setup]:
        before += event >= 0
        if event >= 0 or -event > trace.loaded:
            events.append(0 if event >= 0 and before <= trace.loaded else event)
    step, total, filled = trace.events[trace.setup :], before, len(events)
    recorded = bytearray(trace.recorded[:before])

    def play(part: array[int], number: int) -> None:
        """Add a part whose allocations have numbers above ``number``; what is left of it is freed at its end."""
        nonlocal total
        here: dict[int, int] = {}
        for event in part:
            if event >= 0:
                number, total = number + 1, total + 1
                here[number] = total
                events.append(event)
                recorded.append(trace.recorded[number - 1])
            elif -event in here:
                events.append(-here.pop(-event))
        events.extend(-each for each in here.values())

    for _ in range(min(STEPS, before_evaluation)):
        play(step, before)
    stepped = len(events)
    if after is not None:
        play(trace.evaluation, before + sum(event >= 0 for event in step))
        for _ in range(min(AFTERWARDS, after)):
            play(step, before)
    return Series(events, bytes(recorded), (filled, stepped) if trace.cached else (stepped,))


def products_held(products: int) -> int:
    """Return the bytes of the code that oneDNN keeps for matrix products in 16 bits, the most recent ones.

    Args:
        products: Number of products of different shapes.
    """
    said = re.match(r"\s*[+-]?\d+", os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") or "1024")
    return PRODUCT * min(products, max(int(said[0]), 0) if said else 0)  # like atoi


def held_by_libc(series: Series) -> int | None:
    """Return the most bytes that the C library's allocator holds, or None if it says nothing (before glibc 2.33)."""
    if sys.platform != "linux":
        return None
    script = str(Path(__file__).with_name("malloc_replay.py"))
    found = []
    for seed in range(REPLAYS):
        numbers = (len(series.events), seed, *series.trims)
        done = subprocess.run(
            [sys.executable, "-S", script, *map(str, numbers)],
            input=series.events.tobytes() + series.recorded,
            capture_output=True,
        )
        if done.returncode or not done.stdout.strip().isdigit():
            return None
        found.append(int(done.stdout))
    return round(statistics.mean(found))


@dataclass(eq=False)
class _Block:
    """A piece of a segment, with its neighbours."""

    size: int
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class _Pool:
    """The free blocks of small or of large requests, by size."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._blocks: dict[int, list[_Block]] = {}

    def take(self, size: int) -> _Block | None:
        """Return the smallest block that is large enough, no longer free, or None."""
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return None
        block = self._blocks[self._sizes[place]][-1]
        self.remove(block)
        return block

    def put(self, block: _Block) -> None:
        """Add a free block."""
        block.free = True
        insort(self._sizes, block.size)
        self._blocks.setdefault(block.size, []).append(block)

    def remove(self, block: _Block) -> None:
        """Take a block out."""
        block.free = False
        del self._sizes[bisect_left(self._sizes, block.size)]
        self._blocks[block.size].remove(block)


def held_by_cuda(events: array[int]) -> int:
    """Return the most bytes that torch's caching allocator reserves on a CUDA device.

    Example:
        >>> held_by_cuda(array("q", [100, 600, -1, 400, 30 << 20])) >> 20  # a small segment and one of 30 MiB
        32
    """
    pools = {True: _Pool(), False: _Pool()}
    reserved = 0
    blocks: list[tuple[_Block, bool]] = []
    for event in events:
        if event < 0:
            block, small = blocks[-event - 1]
            _release(block, pools[small])
            continue
        size = max(ROUND, -(-event // ROUND) * ROUND)
        small = size <= SMALL
        found = pools[small].take(size)
        if found is None:
            segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE_BELOW else _rounded(size)
            reserved += segment
            found = _Block(segment)
        if found.size - size >= (ROUND if small else MIB + 1):
            rest = _Block(found.size - size, before=found, after=found.after)
            if found.after is not None:
                found.after.before = rest
            found.after, found.size = rest, size
            pools[small].put(rest)
        blocks.append((found, small))
    return reserved


def _rounded(size: int) -> int:
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def _release(block: _Block, pool: _Pool) -> None:
    """Free a block, joined with its free neighbours."""
    if (left := block.before) is not None and left.free:
        pool.remove(left)
        block.size, block.before = block.size + left.size, left.before
        if left.before is not None:
            left.before.after = block
    if (right := block.after) is not None and right.free:
        pool.remove(right)
        block.size, block.after = block.size + right.size, right.after
        if right.after is not None:
            right.after.before = block
    pool.put(block)
