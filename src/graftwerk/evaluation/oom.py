"""Running out of memory: telling it from other faults, and giving back what failed."""

from __future__ import annotations

import gc

import torch

_SAID_AS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which does not say why; the shapes are torch's own
    "could not create a memory",
    "unable to mmap",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means out of memory.

    torch has a class of its own for accelerators, and a plain RuntimeError for the CPU; Python has MemoryError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID_AS)


def release() -> None:
    """Give back what failed tensors held, as far as the allocators do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
