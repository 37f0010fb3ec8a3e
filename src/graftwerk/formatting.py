"""Formatting of numbers for the terminal. An unknown value is a dash, never a zero.

The HTML report has its own (`reporting/numbers.py`), which sets numbers with narrow spaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "\N{EN DASH}"


def figure(measured: Any) -> tuple[str, str]:
    """Format ``{"value", "low", "high"}`` or a bare number as value and interval; a dash if nothing was measured."""
    if isinstance(measured, Mapping):
        value, low, high = (measured.get(key) for key in ("value", "low", "high"))
        return number(value), f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    return number(measured), ""


def number(value: float | None) -> str:
    """Format with three decimals: 0.788."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3f}"


def percent(value: float) -> str:
    """Format a share in percent without the sign: 0.788 -> 78.8."""
    return f"{100 * value:.1f}"


def share(value: float) -> str:
    """Format a share in percent: 0.0123 -> 1.23 %."""
    return f"{100 * value:.3g} %"


def count(value: float) -> str:
    """Format a number of parameters in a sentence, exact below a million: 338,690, 22.7 M."""
    return f"{value:,.0f}" if value < 1e6 else short_count(value)


def short_count(value: float | None) -> str:
    """Format a number of parameters in a column: 770, 43.9 k, 339 k, 22.7 M."""
    return _scaled(value, ("", " k", " M", " B"))


def byte_size(value: float | None) -> str:
    """Format bytes in powers of 1000: 480 B, 1.4 MB, 512 MB."""
    return _scaled(value, (" B", " kB", " MB", " GB"))


def milliseconds(value: float | None) -> str:
    """Format milliseconds in a column that names the unit: 4.12, 41.2, 412."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def seconds(value: float) -> str:
    """Format a measured time: 850 µs, 3.2 ms, 4.1 s, 2 min 05 s, 1 h 02 min."""
    if value <= 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else _hours(minutes)


def duration(value: float | None) -> str:
    """Format an estimated time, or one in a column: 42 s, 3 min 20 s, 12 min, 1 h 05 min."""
    if value is None:
        return DASH
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes < 10 else f"{minutes} min"
    return _hours(minutes)


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float | None, units: Sequence[str]) -> str:
    """In steps of a thousand, three digits that count; whole numbers in the first unit."""
    if value is None:
        return DASH
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.0f}{unit}" if unit == units[0] or value >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}{units[-1]}"
