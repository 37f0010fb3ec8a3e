"""Running out of memory: telling it from other faults, and saying it with numbers."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_SAID_AS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has a class of its own for accelerators, a plain RuntimeError for the CPU; Python has MemoryError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID_AS)


def release() -> None:
    """Give back what failed tensors held, as far as the allocators do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def numbers(device: torch.device) -> str:
    """How much this process holds and how much there is, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device) / 2**30
        return f"{used:.1f} GiB in use, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on {device}"
    held = _kilobytes("/proc/self/status", "VmRSS:")
    free_kilobytes = _kilobytes("/proc/meminfo", "MemAvailable:")
    if held is None or free_kilobytes is None:
        return "the machine does not say how much memory is in use"
    return f"this process holds {held / 2**20:.1f} GiB, {free_kilobytes / 2**20:.1f} GiB are available"


def _kilobytes(path: str, field: str) -> int | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
