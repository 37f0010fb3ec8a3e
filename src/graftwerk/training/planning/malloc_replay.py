"""Replay allocations through the C library's own allocator; run as a script, in a process of its own (`allocator`).

Nothing is written into the blocks, so that the replay of a large model takes no memory. Around every tensor lie the
small blocks that torch makes for it: those of the tensor itself, and those of autograd's node for an operation that it
records. They are freed at other times than their neighbours, which keeps freed memory in pieces. How the pieces fall
hangs on a few bytes more or less, so their sizes are drawn: one replay tells little, the mean of several much.

    python -S malloc_replay.py EVENTS SEED PLACE... < events and flags
"""

from __future__ import annotations

import ctypes
import random
import sys
from array import array

PAGE = 1 << 14
"""Bytes of the pieces in which touched memory is counted."""
TENSOR, NODE_BEFORE, NODE_AFTER = (176, 96), (16, 24, 96), (176, 464, 24)
"""Bytes of the small blocks of a tensor, and of those that autograd makes before and after its own block: the sizes
that outlive the next tensor most often in a log of LoRA on MiniLM."""
DRAWN, SPREAD = 997, 0.3
"""Sizes that are drawn of each, and by what share of themselves they differ."""
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


class Heap:
    """The C library's heap of this process, and how much of it is resident.

    Until `trim` that is all of it: what is freed stays resident. From then on it is what was in use then, and every
    piece of memory that a block was taken from since.
    """

    def __init__(self) -> None:
        self.libc = libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Info
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.touched: set[int] | None = None
        self.in_use = 0

    def resident(self) -> int:
        """Return the resident bytes."""
        now = self.libc.mallinfo2()
        own = now.arena if self.touched is None else self.in_use + len(self.touched) * PAGE
        return int(own + now.hblkhd)

    def trim(self) -> None:
        """Give what is free back to the system, as `graftwerk.machine.give_back` does."""
        self.libc.malloc_trim(0)
        self.touched, self.in_use = set(), self.libc.mallinfo2().uordblks

    def small(self, sizes: list[int] | tuple[int, ...]) -> list[int]:
        """Take small blocks."""
        return [self.libc.malloc(size) for size in sizes]

    def tensor(self, size: int) -> int:
        """Take a block as torch does for a tensor's values."""
        pointer, mapped = ctypes.c_void_p(), self.libc.mallinfo2().hblkhd
        if self.libc.posix_memalign(ctypes.byref(pointer), 64, size):
            raise MemoryError(size)
        address = int(pointer.value or 0)
        if self.touched is not None and self.libc.mallinfo2().hblkhd == mapped:  # else it has pages of its own
            self.touched.update(range(address // PAGE, (address + size) // PAGE + 1))
        return address

    def free(self, addresses: list[int]) -> None:
        """Free blocks."""
        for address in addresses:
            self.libc.free(address)


def replay(events: array[int], recorded: bytes, seed: int, *trims: int) -> int:
    """Return the most bytes that are resident at any time, above the start.

    Args:
        events: For each allocation its size, or minus the number (from 1) of the allocation that is freed.
        recorded: For each allocation 1 if autograd has a node for it.
        seed: Seed of the sizes of small blocks.
        trims: Places of the events before which freed memory is given back to the system.
    """
    draw = random.Random(seed)

    def sizes(of: tuple[int, ...]) -> list[list[int]]:
        return [[int(size * draw.uniform(1 - SPREAD, 1 + SPREAD)) for size in of] for _ in range(DRAWN)]

    plain, before, after = sizes(TENSOR), sizes(TENSOR + NODE_BEFORE), sizes(NODE_AFTER)
    heap = Heap()
    blocks: list[list[int]] = [[]]
    start, most = heap.resident(), 0
    for place, event in enumerate(events):
        if place in trims:
            heap.trim()
        if event < 0:
            heap.free(blocks[-event])
        elif event == 0:
            blocks.append([])
        else:
            node, turn = recorded[len(blocks) - 1], place % DRAWN
            taken = heap.small(before[turn] if node else plain[turn])
            taken.append(heap.tensor(event))
            blocks.append(taken + heap.small(after[turn] if node else ()))
            most = max(most, heap.resident())
    return max(most - start, 0)


if __name__ == "__main__":
    count, *numbers = map(int, sys.argv[1:])
    data, series = sys.stdin.buffer.read(), array("q")
    series.frombytes(data[: 8 * count])
    print(replay(series, data[8 * count :], *numbers))
