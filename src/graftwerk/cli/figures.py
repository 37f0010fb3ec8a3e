"""How numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def figure(measured: Any) -> tuple[str, str]:
    """``{"value", "low", "high"}`` or a bare number, as its value and its interval; nothing measured is a dash."""
    if isinstance(measured, Mapping):
        value, low, high = (measured.get(key) for key in ("value", "low", "high"))
        return number(value), f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    return number(measured), ""


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}"


def count(value: float) -> str:
    """A number of parameters: 1,234 or 12.3 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:,.0f}"


def share(value: float) -> str:
    """0.0123 -> 1.23 %."""
    return f"{100 * value:.3g} %"


def byte_size(value: float) -> str:
    """Bytes in powers of 1000: 1.2 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration: 850 µs, 3.2 ms, 4.1 s, 2 min 05 s, 1 h 02 min."""
    if value <= 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
