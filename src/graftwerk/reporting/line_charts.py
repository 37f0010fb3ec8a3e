"""Lines over the steps of a run: losses, validation metrics, the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graftwerk.reporting import numbers
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.frame import BOTTOM, LABEL_SIZE, RIGHT, TOP, Frame, axes, circle, label, line, path, svg
from graftwerk.reporting.labels import Box, text_width
from graftwerk.reporting.scales import Linear, around, from_zero

MOST_POINTS = 400
"""More are thinned out: each point drawn stands for the mean of its neighbours."""
SIZES = {"wide": 760.0, "narrow": 350.0}
DOTS = 30
"""With so many points or fewer, each gets a dot."""


@dataclass(frozen=True)
class Curve:
    """A line: its name, its class in the style sheet, and (step, value) in order; None is a gap (a loss of nan)."""

    name: str
    kind: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out: the step that was kept."""

    step: float
    value: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run.

    Attributes:
        title: Of the height axis.
        show: How a value is written.
        height: In pixels.
        zero: The height axis begins at zero.
        least: What it spans at least.
        tick: How a value is written at the axis, if otherwise.
        over: What the curves go over, on the axis and beside values.
    """

    curves: Sequence[Curve]
    title: str
    show: Callable[[float | None], str]
    height: float = 260.0
    zero: bool = False
    least: float = 0.0
    marks: Sequence[Mark] = ()
    tick: Callable[[float], str] | None = None
    over: str = "Step"

    def values(self) -> list[float]:
        """Return all values that the chart shows: those of its curves and marks."""
        found = [value for curve in self.curves for _, value in curve.points if value is not None]
        return found + [mark.value for mark in self.marks]

    def scale(self, start: float, end: float) -> Linear:
        """Return the scale of the height axis from ``start`` to ``end``, in pixels."""
        values = self.values()
        return from_zero(values, start, end) if self.zero else around(values, start, end, least=self.least)

    def written(self, value: float) -> str:
        """Return a value as it is written at the axis."""
        return (self.tick or self.show)(value)

    def names(self) -> list[str]:
        """Return the names of the curves, or none for a single curve, which the title names."""
        return [curve.name for curve in self.curves] if len(self.curves) > 1 else []

    def room(self, size: str) -> tuple[float, float]:
        """Return the margins in pixels: left for the axis, right for the names at the ends of the lines."""
        left = Frame.around(0, 0, [self.written(value) for value in self.scale(0, 1).ticks(6)]).inner.left
        names = self.names() if size == "wide" else []
        return left, max((text_width(name, LABEL_SIZE) + 12 for name in names), default=RIGHT)


def charts(wanted: Sequence[Chart], *, steps: float) -> list[Markup]:
    """Draw charts one below the other, in which a step has the same place.

    Each comes in two widths; the pointer or the arrow keys read the values.

    Args:
        wanted: The charts; one without values becomes a sentence.
        steps: How many the run has in all: the width of the charts.
    """
    thinned = [
        replace(chart, curves=[Curve(curve.name, curve.kind, _thinned(curve.points)) for curve in chart.curves])
        for chart in wanted
    ]
    rooms = {size: [chart.room(size) for chart in thinned if chart.values()] for size in SIZES}
    return [
        join(
            _draw(chart, max(steps, 1.0), size, max(left for left, _ in rooms[size]), max(r for _, r in rooms[size]))
            for size in SIZES
        )
        if chart.values()
        else tag("p", f"{chart.title}: no values.", class_="missing")
        for chart in thinned
    ]


def _draw(chart: Chart, steps: float, size: str, left: float, right: float) -> Markup:
    curves, title, show, tick = chart.curves, chart.title, chart.show, chart.written
    names = chart.names()
    width = SIZES[size]
    frame = Frame(width, chart.height, Box(left, TOP, width - right, chart.height - BOTTOM))
    inner = frame.inner
    x, y = Linear(0.0, steps, inner.left, inner.right), chart.scale(inner.bottom, inner.top)
    parts = [
        axes(
            frame, x, y, x_text=lambda step: f"{step:,.0f}" if step == round(step) else "", y_text=tick,
            x_title=f"{chart.over} \N{RIGHTWARDS ARROW}", y_title=title,
        )
    ]  # fmt: skip
    track: list[tuple[float, float, str]] = []
    ends: list[tuple[float, Curve]] = []
    for curve in curves:
        for piece in _pieces(curve.points):
            drawn = [(x(step), y(value)) for step, value in piece]
            parts.append(path(drawn, f"line {curve.kind}"))
            if len(curve.points) <= DOTS or len(piece) == 1:
                parts += [circle(px, py, 3, f"knot {curve.kind}") for px, py in drawn]
            track += [
                (round(x(step), 1), round(y(value), 1), f"{chart.over} {step:,.0f}\n{curve.name}\t{show(value)}")
                for step, value in piece
            ]
        last = [value for _, value in curve.points if value is not None]
        if last:
            ends.append((y(last[-1]), curve))
    for mark in chart.marks:
        px, py = x(mark.step), y(mark.value)
        parts.append(circle(px, py, 6, "kept"))
        parts.append(_beside(mark.text, px, py, inner.left, inner.right, 20.0))
    if names and size == "wide":
        parts += [label(curve.name, inner.right + 8, at + 4, f"name {curve.kind}") for at, curve in _spread(ends)]
    elif names:
        parts.append(_legend([curve for _, curve in ends], frame))
    cursor = tag(
        "g", line(0, inner.top, 0, inner.bottom, "cursor-line"), circle(0, 0, 4.5, "cursor-dot"), class_="cursor"
    )
    track.sort()
    return svg(
        frame,
        *parts,
        cursor,
        class_=f"chart curve {size}",
        role="img",
        tabindex="0",
        data_track=json.dumps(track, ensure_ascii=False, separators=(",", ":")),
        aria_label=_description(title, curves, show, chart.over.lower()),
    )


def _beside(text: str, px: float, py: float, left: float, right: float, top: float) -> Markup:
    """Return the words of a mark, above or below it, inside the chart."""
    half = text_width(text, LABEL_SIZE) / 2
    middle = min(max(px, left + half), right - half)
    height = py - 12 if py - 12 > top else py + 12 + LABEL_SIZE
    return label(text, middle, height, "name kept-name", "middle")


def _spread(ends: Sequence[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Return names at the ends of their lines, a line of text apart."""
    placed: list[tuple[float, Curve]] = []
    for at, curve in sorted(ends, key=lambda end: end[0]):
        placed.append((max(at, placed[-1][0] + LABEL_SIZE + 3) if placed else at, curve))
    return placed


def _legend(curves: Sequence[Curve], frame: Frame) -> Markup:
    """Return names above the chart, flush right, for lines without room at their ends."""
    parts, right = [], frame.width
    for curve in reversed(curves):
        parts.append(label(curve.name, right, 14, f"name {curve.kind}", "end"))
        right -= text_width(curve.name, LABEL_SIZE) + 12
    return join(reversed(parts))


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Return the pieces of a line between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is not None:
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return at most `MOST_POINTS`: means over equal numbers of neighbours, at their last step."""
    every = -(-len(points) // MOST_POINTS)
    if every <= 1:
        return list(points)
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(points), every):
        group = points[start : start + every]
        known = [value for _, value in group if value is not None]
        thinned.append((group[-1][0], sum(known) / len(known) if known else None))
    return thinned


def _description(title: str, curves: Sequence[Curve], show: Callable[[float | None], str], over: str) -> str:
    parts = []
    for curve in curves:
        known = [(step, value) for step, value in curve.points if value is not None]
        if known:
            (first, begin), (last, end) = known[0], known[-1]
            parts.append(f"{curve.name}: {show(begin)} at {over} {first:,.0f}, {show(end)} at {over} {last:,.0f}")
    return f"{title}. {'; '.join(parts)}. {numbers.title('arrow keys')} read single values."
