"""Running out of memory, said with numbers."""

from __future__ import annotations

import torch

from graftwerk.evaluation.oom import is_out_of_memory as is_out_of_memory
from graftwerk.evaluation.oom import release as release
from graftwerk.machine import available as available
from graftwerk.machine import kilobytes


def numbers(device: torch.device) -> str:
    """How much this process holds and how much there is, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device) / 2**30
        return f"{used:.1f} GiB in use, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on {device}"
    held = kilobytes("/proc/self/status", "VmRSS:")
    free_bytes = available()
    if held is None or free_bytes is None:
        return "the machine does not say how much memory is in use"
    return f"this process holds {held / 2**20:.1f} GiB, {free_bytes / 2**30:.1f} GiB are available"
