"""Monotonic time of a training: the total, carried over resumes, and the pace that says how long is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

PROGRESS_SECONDS = 0.25
"""People are told at most so often."""


class Clock:
    """Attributes: ``step_seconds``, a running mean; ``evaluation_seconds``, of the last one."""

    def __init__(self) -> None:
        self.step_seconds = self.evaluation_seconds = 0.0
        self._carried = self._told = 0.0
        self._started = self._last = time.monotonic()

    def start(self, carried: float) -> None:
        """Begin, with the seconds that earlier parts of the same run took."""
        self._carried = carried
        self._started = self._last = time.monotonic()

    def seconds(self) -> float:
        return self._carried + time.monotonic() - self._started

    def step(self) -> None:
        now = time.monotonic()
        took, self._last = now - self._last, now
        self.step_seconds = took if not self.step_seconds else 0.9 * self.step_seconds + 0.1 * took

    def pause(self) -> float:
        """What was done since the last step is no part of the pace; gives its seconds."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        return took

    def progress_due(self) -> bool:
        if self._last - self._told < PROGRESS_SECONDS:
            return False
        self._told = self._last
        return True


def seconds_since_process_start(process: int | str = "self") -> float:
    """Since the kernel started a process, by the clock that counts from boot; 0.0 where there is no /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
        ticks = int(stat[stat.rindex(")") + 2 :].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, AttributeError):
        return 0.0
