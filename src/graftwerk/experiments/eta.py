"""Remaining time of a comparison, estimated from its finished runs and the steps of the active one."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean


@dataclass
class EtaEstimator:
    """Seconds of whole runs (start, loading and measuring included), by method.

    A method's next seed takes about what its others took. For a method that has not run yet the mean of the others
    stands in, until its own steps tell better.
    """

    planned: list[str]
    done: int = 0
    _seconds: dict[str, list[float]] = field(default_factory=dict)

    def finished(self, method: str, seconds: float | None) -> None:
        """Count a finished run.

        Args:
            method: Name of its method.
            seconds: Its duration, or None if it was finished already, so that it says nothing about time.
        """
        self.done += 1
        if seconds is not None:
            self._seconds.setdefault(method, []).append(seconds)

    def expected(self, method: str) -> float | None:
        """Return the expected seconds of a run of a method, or None while nothing is known."""
        own = self._seconds.get(method)
        if own:
            return fmean(own)
        known = [fmean(seconds) for seconds in self._seconds.values()]
        return fmean(known) if known else None

    def left(self, elapsed: float = 0.0, steps_left: float | None = None) -> float | None:
        """Return the estimated seconds to the end of all runs.

        Args:
            elapsed: Seconds since the start of the active run.
            steps_left: Seconds that training estimates for its remaining steps; better than the times of other runs.
        """
        waiting = list(self.planned[self.done :])
        if not waiting:
            return 0.0
        current = self.expected(waiting[0])
        if steps_left is not None:
            now: float | None = steps_left
        else:
            now = None if current is None else max(current - elapsed, 0.0)
        stand_in = elapsed + steps_left if steps_left is not None else current
        rest = [self.expected(method) or stand_in for method in waiting[1:]]
        if now is None or any(seconds is None for seconds in rest):
            return None
        return now + sum(seconds for seconds in rest if seconds is not None)
