"""Write numbers for people, on a terminal and on a page. What is not known is a dash, never a zero.

``space`` stands between a number and its unit; a page gives a narrow one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

DASH = "\N{EN DASH}"


def figure(measured: Any) -> tuple[str, str]:
    """Return ``{"value", "low", "high"}``, or a bare number, as its value and its interval; a dash if not measured."""
    if isinstance(measured, Mapping):
        value, low, high = (measured.get(key) for key in ("value", "low", "high"))
        return number(value), f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    return number(measured), ""


def number(value: float | None) -> str:
    """Return a number with three decimals: 0.788."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3f}"


def percent(value: float) -> str:
    """Return a share of one in percent, without the sign: 0.788 -> 78.8."""
    return f"{100 * value:.1f}"


def share(value: float | None, space: str = " ") -> str:
    """Return a share of one, however small, with its sign: 0.0149 -> 1.5 %, 0.0000339 -> 0.0034 %."""
    if value is None:
        return DASH
    text = f"{100 * value:.1f}" if value >= 0.01 or value == 0 else f"{100 * value:.2g}"
    return f"{text}{space}%"


def count(value: float) -> str:
    """Return a number of parameters in a sentence, exact below a million: 338,690, 22.7 M."""
    return f"{value:,.0f}" if value < 1e6 else short_count(value)


def short_count(value: float | None, space: str = " ") -> str:
    """Return a number of parameters in a column: 770, 43.9 k, 339 k, 22.7 M."""
    return _scaled(value, ("", "k", "M", "B"), space)


def byte_size(value: float | None, space: str = " ") -> str:
    """Return bytes in powers of 1000: 480 B, 1.4 MB, 512 MB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"), space)


def milliseconds(value: float | None) -> str:
    """Return milliseconds without their unit: 4.12, 41.2, 412."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def seconds(value: float) -> str:
    """Return a time that was measured: 850 µs, 3.2 ms, 4.1 s, 2 min 05 s, 1 h 02 min."""
    if value <= 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else _hours(minutes, " ")


def duration(value: float | None, space: str = " ") -> str:
    """Return a time that is estimated, or stands in a column: 42 s, 3 min 20 s, 12 min, 1 h 05 min."""
    if value is None:
        return DASH
    if value < 59.5:
        return f"{value:.0f}{space}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{space}min {rest:02d}{space}s" if minutes < 10 else f"{minutes}{space}min"
    return _hours(minutes, space)


def columns(rows: Sequence[Sequence[str]], left: Container[int], *, rule: bool = False) -> str:
    """Return rows of cells as lines, with the cells of a column below each other.

    Args:
        rows: Cells as text; all rows have the same number.
        left: Positions of the columns that are flush left; the others are flush right.
        rule: Draw a line below the first row.
    """
    padded = []
    for at, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        lined = (column[0], "-" * width, *column[1:]) if rule else column
        padded.append([cell.ljust(width) if at in left else cell.rjust(width) for cell in lined])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _hours(minutes: int, space: str) -> str:
    return f"{minutes // 60}{space}h {minutes % 60:02d}{space}min"


def _scaled(value: float | None, units: Sequence[str], space: str) -> str:
    """Return a number in steps of a thousand with three digits that count; whole numbers in the first unit."""
    if value is None:
        return DASH
    for unit in units[:-1]:
        if abs(value) < 999.5:
            digits = 0 if unit == units[0] or abs(value) >= 99.95 else 1
            return f"{value:.{digits}f}{space if unit else ''}{unit}"
        value /= 1000
    return f"{value:.1f}{space}{units[-1]}"
