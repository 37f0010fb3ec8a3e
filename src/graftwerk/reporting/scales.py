"""From values to pixels: scales, and the round values that stand on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks that people can count in, times a power of ten."""
TINY = 1e-12


@dataclass(frozen=True)
class Linear:
    """Equal distances for equal differences.

    Attributes:
        low, high: Of the values; low < high.
        start, end: Pixels of the two; end may be the smaller one, as for heights.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values from low to high, at most so many (and two at least where that is possible)."""
        step = _step((self.high - self.low) / max(most - 1, 1))
        first, last = math.ceil(self.low / step - TINY), math.floor(self.high / step + TINY)
        return [multiple * step for multiple in range(first, last + 1)]


@dataclass(frozen=True)
class Log:
    """Equal distances for equal ratios; the same attributes, 0 < low < high."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return powers of ten; with few decades also their multiples by 2 and 5, with many only some of them."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for parts, every in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), every) for every in range(1, last - first + 2))):
            found = [part * 10.0**power for power in range(first, last + 1, every) for part in parts]
            found = [tick for tick in found if self.low * (1 - TINY) <= tick <= self.high * (1 + TINY)]
            if len(found) <= most:
                return found
        return []


Scale = Linear | Log

CLOCK = (
    1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800,
)  # fmt: skip
"""Seconds that are round on a clock."""


def clock_ticks(scale: Scale, most: int = 6) -> list[float]:
    """Round times on a scale of seconds; shorter and longer ones than `CLOCK` has are left to `ticks`."""
    if isinstance(scale, Log):
        inside = [float(time) for time in CLOCK if scale.low <= time <= scale.high]
        every = -(-len(inside) // most) if inside else 1
        return inside[::every] if len(inside) > 1 else scale.ticks(most)
    rough = (scale.high - scale.low) / max(most - 1, 1)
    step = next((time for time in CLOCK if time >= rough), None) if rough > 1 else None
    if step is None:
        return scale.ticks(most)
    return [float(time) for time in range(0, int(scale.high) + 1, step) if time >= scale.low]


def around(values: Iterable[float], start: float, end: float, *, least: float = 0.0, margin: float = 0.06) -> Linear:
    """Return a linear scale with margins on both sides of all values and a least span.

    A scale never vanishes: with a single value it spans something round about it.
    """
    known = list(values)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    span = max(high - low, least, abs(high) * 1e-6, 1e-9)
    middle = (low + high) / 2
    half = span / 2 + span * margin
    return Linear(middle - half, middle + half, start, end)


def from_zero(values: Sequence[float], start: float, end: float) -> Linear:
    """Return a linear scale from zero, for seconds, bytes and the like."""
    high = max(values, default=1.0)
    return Linear(0.0, 1.08 * high if high > 0 else 1.0, start, end)


def decades(values: Sequence[float], start: float, end: float) -> Log:
    """Return a logarithmic scale with margins on both sides of all values, which are positive."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    if high / low < 3:
        low, high = low / 2, high * 2
    room = (high / low) ** 0.07
    return Log(low / room, high * room, start, end)


def _step(rough: float) -> float:
    """Return the smallest round distance that is no smaller."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(step * power for step in STEPS if step * power >= rough * (1 - 1e-9))
