"""Monotonic time of a training: the total, carried over resumes, and the pace that says how long is left."""

from __future__ import annotations

import time

PROGRESS_SECONDS = 0.25
"""Shortest time between two progress events."""


class Clock:
    """Measure the time of a training.

    Attributes:
        step_seconds: Running mean of the seconds of a step; 0 until two steps are done, since the first one does much
            that is done once.
        evaluation_seconds: Seconds of the last evaluation, 0 before there was one.
        mean_step_seconds: Mean of the seconds of a step of this process, without the first; None until two are done.
        first_step_at: Value of `time.monotonic()` after the first step of this process; None before.
    """

    def __init__(self) -> None:
        self.step_seconds = self.evaluation_seconds = 0.0
        self._carried = self._told = 0.0
        self.mean_step_seconds: float | None = None
        self._steps = 0
        self._started = self._last = time.monotonic()
        self.first_step_at: float | None = None

    def start(self, carried: float) -> None:
        """Start the clock.

        Args:
            carried: Seconds that earlier parts of the same run took.
        """
        self._carried = carried
        self._started = self._last = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of training so far, over all parts of the run."""
        return self._carried + time.monotonic() - self._started

    def step(self) -> None:
        """Note the end of a step."""
        now = time.monotonic()
        self.first_step_at = self.first_step_at or now
        took, self._last = now - self._last, now
        if self._steps:
            self.step_seconds += max(0.1, 1 / self._steps) * (took - self.step_seconds)
            before = self.mean_step_seconds or 0.0
            self.mean_step_seconds = before + (took - before) / self._steps
        self._steps += 1

    def pause(self) -> float:
        """Leave the time since the last step out of the pace, and return its seconds."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        return took

    def progress_due(self) -> bool:
        """Return True at most every `PROGRESS_SECONDS`."""
        if self._last - self._told < PROGRESS_SECONDS:
            return False
        self._told = self._last
        return True
