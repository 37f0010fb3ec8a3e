"""Running out of memory, said with numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from graftwerk.evaluate.exhausted import is_out_of_memory as is_out_of_memory
from graftwerk.evaluate.exhausted import release as release


def numbers(device: torch.device) -> str:
    """How much this process holds and how much there is, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device) / 2**30
        return f"{used:.1f} GiB in use, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on {device}"
    held = _kilobytes("/proc/self/status", "VmRSS:")
    free_bytes = available()
    if held is None or free_bytes is None:
        return "the machine does not say how much memory is in use"
    return f"this process holds {held / 2**20:.1f} GiB, {free_bytes / 2**30:.1f} GiB are available"


def available() -> int | None:
    """Bytes of memory that can be had without swapping, of the machine and of the control group, the lesser; None where
    the machine does not say.
    """
    kilobytes = _kilobytes("/proc/meminfo", "MemAvailable:")
    if kilobytes is None:
        return None
    group = _group_available(Path("/sys/fs/cgroup"))
    return kilobytes * 1024 if group is None else min(kilobytes * 1024, group)


def _group_available(group: Path) -> int | None:
    """Bytes that a control group (version 2) has left, files that it can let go not counted; None: no limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        held = int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - held + int(files.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def _kilobytes(path: str, field: str) -> int | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
