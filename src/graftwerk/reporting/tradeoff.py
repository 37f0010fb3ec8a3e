"""The trade-off chart: quality against cost, one point a method with its interval, its name beside it.

It is drawn once for every cost and for two widths; which one is seen is decided by the style sheet (a radio button, a
media query), so that the switch works without scripts, with the keyboard, and in print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graftwerk.reporting import numbers
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.frame import LABEL_SIZE, Frame, axes, label, line, path, svg
from graftwerk.reporting.frame import point as frame_point
from graftwerk.reporting.labels import Box, cut, place, text_width
from graftwerk.reporting.scales import Linear, Scale, around, clock_ticks, decades, from_zero

SIZES = {"wide": (760.0, 420.0, 28), "narrow": (350.0, 400.0, 18)}
"""Width and height in pixels, and the longest name."""
APART = 9.0
"""Pixels between two points that would otherwise hide each other's intervals."""
LOGARITHMIC_FROM = 8.0
"""A cost that spans more than this ratio gets a logarithmic axis."""


@dataclass(frozen=True)
class Cost:
    """A cost that the x axis can show: its key in the files, its name, and functions that format values and ticks."""

    key: str
    name: str
    show: Callable[[float | None], str]
    ticks: Callable[[Scale, int], list[float]] = lambda scale, most: scale.ticks(most)


COSTS = (
    Cost("trained_parameters", "trained parameters", numbers.count),
    Cost("training_seconds", "training time", numbers.seconds, clock_ticks),
    Cost("peak_memory_bytes", "peak memory", numbers.byte_size),
    Cost("latency_ms_batch_1", "latency, one row", numbers.milliseconds),
    Cost("latency_ms_batch_32", "latency a row, 32 at once", numbers.milliseconds),
    Cost("adapter_bytes", "adapter size", numbers.byte_size),
)


@dataclass(frozen=True)
class Point:
    """A method: its quality in the metric's own unit, its costs by key (None if not measured), and a description."""

    name: str
    value: float
    low: float | None
    high: float | None
    costs: Mapping[str, float | None]
    details: str
    recommended: bool = False


def tradeoff(points: Sequence[Point], fronts: Mapping[str, Sequence[str]], metric: str) -> Markup:
    """Return the chart of quality against cost, with a switch between costs; costs that no method has are left out.

    Args:
        points: The methods that were measured.
        fronts: Names on the Pareto front by cost, cheapest first.
        metric: What the quality is, by its name in the files, for the axis.
    """
    shown = [cost for cost in COSTS if any(_has(point, cost) for point in points)]
    if not shown:
        return tag("p", "No cost was measured, so there is no trade-off to draw.", class_="missing")
    inputs = [
        tag("input/", type="radio", name="cost", id=f"cost-{place}", value=cost.key, checked=place == 0)
        for place, cost in enumerate(shown)
    ]
    choices = [tag("label", cost.name, for_=f"cost-{place}") for place, cost in enumerate(shown)]
    panels = [
        tag("div", _panel(points, fronts, cost, metric), class_=f"panel panel-{n}") for n, cost in enumerate(shown)
    ]
    return tag(
        "fieldset",
        tag("legend", "Cost on the horizontal axis"),
        *inputs,
        tag("div", *choices, class_="choices"),
        tag("div", *panels, class_="panels"),
        class_="tradeoff",
    )


def _panel(points: Sequence[Point], fronts: Mapping[str, Sequence[str]], cost: Cost, metric: str) -> Markup:
    known = [point for point in points if _has(point, cost)]
    missing = [point.name for point in points if point not in known]
    front = fronts.get(cost.key, ())
    charts, unnamed = [], list[str]()
    for size in SIZES:
        chart, left_out = _chart(known, front, cost, metric, size)
        charts.append(chart)
        unnamed += [name for name in left_out if name not in unnamed]
    notes = []
    if missing:
        notes.append(f"Not measured, so not drawn: {numbers.listed(missing)}.")
    if unnamed:
        notes.append(f"No room for the name of {numbers.listed(unnamed)}.")
    return join([*charts, *(tag("p", note, class_="missing") for note in notes)])


def _chart(
    points: Sequence[Point], front: Sequence[str], cost: Cost, metric: str, size: str
) -> tuple[Markup, list[str]]:
    """Return the chart, and the methods whose names did not fit."""
    width, height, longest = SIZES[size]
    bounds = [bound for point in points for bound in (point.low, point.value, point.high) if bound is not None]
    y = around(bounds, 0, 1, least=numbers.least_span(metric))
    frame = Frame.around(width, height, [_tick(tick, y, metric) for tick in y.ticks(6)])
    inner = frame.inner
    y = around(bounds, inner.bottom, inner.top, least=numbers.least_span(metric))
    x = _scale(points, cost, inner)
    middles = dict(zip([p.name for p in points], _apart([x(_cost(p, cost)) for p in points], inner), strict=True))
    where = [(middles[point.name], y(point.value)) for point in points]
    names = [cut(point.name, longest) for point in points]
    obstacles = [Box(px - 6, py - 6, px + 6, py + 6) for px, py in where]
    for (px, _), point in zip(where, points, strict=True):
        if point.low is not None and point.high is not None:
            obstacles.append(Box(px - 3, y(point.high) - 1, px + 3, y(point.low) + 1))
    corners = _corners(front, middles, {point.name: y(point.value) for point in points}, inner)
    for (x1, y1), (x2, y2) in pairwise(corners):
        obstacles.append(Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))
    placed = place(where, [(1.08 * text_width(name, LABEL_SIZE), 16.0) for name in names], obstacles, inner)
    marks, texts = [], []
    for point, (px, py), name, spot in zip(points, where, names, placed, strict=True):
        kind = "recommended" if point.recommended else "on-front" if point.name in front else "beaten"
        bar = None
        if point.low is not None and point.high is not None:
            bar = line(px, y(point.high), px, y(point.low), "bar")
        text, leader = None, None
        if spot is not None:
            before = spot.box.right <= px
            edge = spot.box.right if before else spot.box.left
            text = label(name, edge, spot.box.bottom - 4, "name", "end" if before else "start")
            leader = line(px, py, *spot.line_end(px, py), "leader") if spot.led else None
        radius = 6.5 if point.recommended else 5.0
        marks.append(frame_point(px, py, point.details, kind, leader, bar, radius=radius))
        texts.append(tag("g", text, class_=f"point {kind}", aria_hidden="true") if text else Markup())
    drawn = svg(
        frame,
        axes(
            frame, x, y,
            x_ticks=cost.ticks, x_text=lambda tick: numbers.short(cost.show(tick)),
            y_text=lambda tick: _tick(tick, y, metric),
            x_title=f"{numbers.title(cost.name)} \N{RIGHTWARDS ARROW}",
            y_title=f"\N{UPWARDS ARROW} {numbers.heading(metric)}",
        ),
        path(corners, "front"),
        *marks,
        *texts,
        class_=f"chart {size}",
        role="group",
        aria_label=f"{numbers.metric_name(metric)} against {cost.name}",
    )  # fmt: skip
    return drawn, [point.name for point, spot in zip(points, placed, strict=True) if spot is None]


def _corners(
    front: Sequence[str], xs: Mapping[str, float], ys: Mapping[str, float], inner: Box
) -> list[tuple[float, float]]:
    """Return the best quality for each cost or less: a staircase through the methods on the front."""
    corners: list[tuple[float, float]] = []
    for name in front:
        if name in xs:
            if corners:
                corners.append((xs[name], corners[-1][1]))
            corners.append((xs[name], ys[name]))
    if corners:
        corners.append((inner.right, corners[-1][1]))
    return corners


def _scale(points: Sequence[Point], cost: Cost, inner: Box) -> Scale:
    values = [_cost(point, cost) for point in points]
    positive = min(values) > 0
    if positive and (cost.key == "trained_parameters" or max(values) / min(values) > LOGARITHMIC_FROM):
        return decades(values, inner.left, inner.right)
    return from_zero(values, inner.left, inner.right)


def _apart(xs: Sequence[float], inner: Box) -> list[float]:
    """Move points that share a place aside by a few pixels, in their order."""
    order = sorted(range(len(xs)), key=lambda index: (xs[index], index))
    gap = min(APART, (inner.right - inner.left) / (len(xs) + 1))
    moved = list(xs)
    for _ in range(40):
        still = True
        for left, right in pairwise(order):
            missing = gap - (moved[right] - moved[left])
            if missing > 1e-3:
                moved[left] -= missing / 2
                moved[right] += missing / 2
                still = False
        moved = [min(max(place, inner.left + 6), inner.right - 6) for place in moved]
        if still:
            break
    return moved


def _tick(value: float, scale: Linear, metric: str) -> str:
    if metric in numbers.OWN_UNIT:
        return numbers.bare(metric, value)
    shown = numbers.scale(metric)
    return f"{shown * value:.{0 if shown * (scale.high - scale.low) > 5 else 1}f}"


def _has(point: Point, cost: Cost) -> bool:
    value = point.costs.get(cost.key)
    return value is not None and value >= 0


def _cost(point: Point, cost: Cost) -> float:
    value = point.costs.get(cost.key)
    assert value is not None
    return value
