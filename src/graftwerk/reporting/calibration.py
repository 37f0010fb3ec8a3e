"""Reliability of probabilities and residuals of numbers, each drawn in two widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graftwerk.reporting import numbers
from graftwerk.reporting.escape import Markup, join
from graftwerk.reporting.files import items, mappings, number
from graftwerk.reporting.frame import Frame, axes, circle, line, point, svg
from graftwerk.reporting.scales import Linear, around

SIZES = {"wide": (560.0, 400.0), "narrow": (350.0, 320.0)}
"""Width and height in pixels."""
Known = tuple[float, float, float, float, float]


def reliability(calibration: Mapping[str, Any]) -> Markup:
    """Draw how often answers are right against how sure the model is, ten bins; empty if there are no bins."""
    bins: list[Known] = []
    for entry in mappings(calibration, "bins"):
        values = [number(entry, part) for part in ("confidence", "right", "low", "high", "rows")]
        if all(value is not None and (0 <= value <= 1 or at == 4) for at, value in enumerate(values)):
            bins.append(tuple(value for value in values if value is not None))  # type: ignore[arg-type]
    if not bins:
        return Markup()
    least = math.floor(10 * min(min(confidence, low) for confidence, _, low, _, _ in bins)) / 10
    return join(_reliability(bins, min(least, 0.9), size) for size in SIZES)


def _reliability(bins: Sequence[Known], least: float, size: str) -> Markup:
    frame, x, y = _scales(size, Linear(least, 1.0, 0, 1), Linear(least, 1.0, 0, 1), _percent)
    marks = []
    for confidence, right, low, high, rows in bins:
        said = f"Sure to {numbers.percent(confidence)}\nRight\t{numbers.percent(right)}\nAnswers\t{numbers.exact(rows)}"
        bar = line(x(confidence), y(low), x(confidence), y(high), "bar")
        marks.append(point(x(confidence), y(right), said, "recommended", bar))
    return svg(
        frame,
        axes(
            frame, x, y, x_text=_percent, y_text=_percent,
            x_title="Probability, % \N{RIGHTWARDS ARROW}", y_title="\N{UPWARDS ARROW} Right, %",
        ),
        line(x(least), y(least), x(1.0), y(1.0), "front"),
        *marks,
        class_=f"chart {size}",
        role="group",
        aria_label="How often answers are right against their probability",
    )  # fmt: skip


def scatter(residuals: Mapping[str, Any]) -> Markup:
    """Draw the residual of rows against their right number; empty if there are no rows."""
    found = [
        (true, residual)
        for pair in items(residuals, "points")
        if isinstance(pair, list) and len(pair) == 2
        and (true := number({"at": pair[0]}, "at")) is not None
        and (residual := number({"at": pair[1]}, "at")) is not None
    ]  # fmt: skip
    return join(_scatter(found, size) for size in SIZES) if found else Markup()


def _scatter(found: Sequence[tuple[float, float]], size: str) -> Markup:
    of_true, of_residual = around([true for true, _ in found], 0, 1), around([0.0, *(rest for _, rest in found)], 0, 1)
    frame, x, y = _scales(size, of_true, of_residual, numbers.plain)
    inner = frame.inner
    return svg(
        frame,
        axes(
            frame, x, y, x_text=numbers.plain, y_text=numbers.plain,
            x_title="Right number \N{RIGHTWARDS ARROW}", y_title="\N{UPWARDS ARROW} Predicted less right",
        ),
        line(inner.left, y(0.0), inner.right, y(0.0), "zero"),
        *(circle(x(true), y(residual), 3, "spot") for true, residual in found),
        class_=f"chart {size}",
        role="img",
        aria_label="Residuals against right numbers",
    )  # fmt: skip


def _scales(size: str, x: Linear, y: Linear, show: Callable[[float], str]) -> tuple[Frame, Linear, Linear]:
    """Return the frame of a chart and its two scales on it."""
    width, height = SIZES[size]
    frame = Frame.around(width, height, [show(tick) for tick in y.ticks(6)])
    inner = frame.inner
    return frame, Linear(x.low, x.high, inner.left, inner.right), Linear(y.low, y.high, inner.bottom, inner.top)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
