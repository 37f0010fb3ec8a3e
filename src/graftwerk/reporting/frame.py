"""Parts that all charts share: size, margins for axes, grid lines at round values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.labels import Box, text_width
from graftwerk.reporting.scales import Scale

LABEL_SIZE, TICK_SIZE = 13.0, 12.0
"""Pixels; the style sheet says the same."""
TOP, BOTTOM, RIGHT = 30.0, 44.0, 14.0


@dataclass(frozen=True)
class Frame:
    """A chart's size in pixels and, within it, the area of the data."""

    width: float
    height: float
    inner: Box

    @classmethod
    def around(cls, width: float, height: float, y_labels: Sequence[str]) -> Frame:
        """Return a frame with a left margin for the longest label of the y axis."""
        left = 8 + max((text_width(label, TICK_SIZE) for label in y_labels), default=0.0)
        return cls(width, height, Box(left, TOP, width - RIGHT, height - BOTTOM))


def heights(frame: Frame) -> int:
    """Return the number of horizontal grid lines that fit, 3 to 6."""
    return max(3, min(6, int((frame.inner.bottom - frame.inner.top) / 32)))


def px(value: float) -> str:
    """Format a coordinate to a tenth of a pixel."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line between two points, in pixels."""
    return tag("line/", x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2), class_=class_)


def circle(x: float, y: float, radius: float, class_: str) -> Markup:
    """Return a circle, with centre and radius in pixels."""
    return tag("circle/", cx=px(x), cy=px(y), r=px(radius), class_=class_)


def label(text: Any, x: float, y: float, class_: str, anchor: str = "start") -> Markup:
    """Return a text at a point, in pixels; ``anchor`` is `start`, `middle` or `end`."""
    return tag("text", text, x=px(x), y=px(y), class_=class_, text_anchor=None if anchor == "start" else anchor)


def point(x: float, y: float, said: str, kind: str, *behind: Any, radius: float = 5.0) -> Markup:
    """Return a point of a chart that the keyboard reaches and that tells what it stands for.

    Args:
        x: Its place, in pixels.
        y: Its place, in pixels.
        said: Lines of a name and a value, with a tab between them.
        kind: A class for the style sheet.
        *behind: What is drawn behind it.
        radius: Of the dot.
    """
    return tag(
        "g", *behind, circle(x, y, 11, "reach"), circle(x, y, radius, "dot"),
        class_=f"point {kind}", tabindex="0", role="img", data_tip=said,
        aria_label=said.replace("\t", ": ").replace("\n", "; "),
    )  # fmt: skip


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Return a line through points."""
    if not points:
        return Markup()
    steps = " ".join(f"{'L' if place else 'M'}{px(x)} {px(y)}" for place, (x, y) in enumerate(points))
    return tag("path/", d=steps, class_=class_)


def axes(
    frame: Frame,
    x: Scale,
    y: Scale,
    *,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_title: str,
    y_title: str,
    x_ticks: Callable[[Scale, int], list[float]] = lambda scale, most: scale.ticks(most),
) -> Markup:
    """Draw grid lines for the heights, ticks for the widths, and their titles above and below."""
    inner = frame.inner
    parts: list[Markup] = [label(y_title, 0, 14, "axis-title")]
    for tick in y.ticks(heights(frame)):
        height = y(tick)
        parts.append(line(inner.left, height, inner.right, height, "grid"))
        parts.append(label(y_text(tick), inner.left - 6, height + 4, "tick", "end"))
    parts.append(line(inner.left, inner.bottom, inner.right, inner.bottom, "base"))
    free = -1e9
    for tick in x_ticks(x, 7 if frame.width > 500 else 5):
        place, text = x(tick), x_text(tick)
        half = text_width(text, TICK_SIZE) / 2
        middle = min(max(place, half), frame.width - half)
        if middle - half < free + 6:
            continue  # it would run into its neighbour
        free = middle + half
        parts.append(line(place, inner.bottom, place, inner.bottom + 4, "base"))
        parts.append(label(text, middle, inner.bottom + 18, "tick", "middle"))
    parts.append(label(x_title, inner.right, frame.height - 6, "axis-title", "end"))
    return join(parts)


def svg(frame: Frame, *content: Any, class_: str, **attributes: Any) -> Markup:
    """Return a chart that shrinks with the page and never grows beyond its size."""
    return tag(
        "svg",
        *content,
        viewBox=f"0 0 {px(frame.width)} {px(frame.height)}",
        width=px(frame.width),
        height=px(frame.height),
        class_=class_,
        **attributes,
    )
