"""Facts about processes that the kernel tells: whether they run, and since when."""

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


def seconds_since_process_start(pid: int | str = "self") -> float:
    """Return the seconds since a process started, by the clock that counts from boot.

    Args:
        pid: Process id, or "self".

    Returns:
        The seconds; 0.0 on systems without /proc.
    """
    ticks = start_ticks(pid)
    if ticks is None:
        return 0.0
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def process_start() -> float:
    """Return the value that `time.monotonic()` had when this process started."""
    return time.monotonic() - seconds_since_process_start()


def is_running(pid: int) -> bool:
    """Return True if a process exists on this machine, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
