"""Since when processes run, as the kernel tells."""

from __future__ import annotations

import os
import time
from pathlib import Path


def start_ticks(pid: int | str = "self") -> int | None:
    """Return the clock ticks after boot at which a process started.

    Args:
        pid: Process id, or "self".

    Returns:
        Field 22 of /proc/<pid>/stat; None if there is no such process, or no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def process_start() -> float:
    """Return the value that `time.monotonic()` had when this process started; on systems without /proc that of now."""
    now, ticks = time.monotonic(), start_ticks()
    if ticks is None:
        return now
    return now - max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
