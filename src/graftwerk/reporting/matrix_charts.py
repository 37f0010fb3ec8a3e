"""Charts of rows and cells: bars of one or more values a row, heat maps, and small heat maps side by side.

Each comes in two widths, is one stop of the tab key, and is read cell by cell by the pointer or the arrow keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.frame import TICK_SIZE, Frame, circle, label, line, px, svg
from graftwerk.reporting.labels import Box, text_width
from graftwerk.reporting.scales import Linear

SIZES = {"wide": 760.0, "narrow": 350.0}
ROW, GAP, TOP, BOTTOM = 20.0, 14.0, 26.0, 24.0
LEVELS = (0.01, 0.05, 0.15, 0.35, 0.6)
"""Shares from which a cell is a shade darker."""
HEADS = {"wide": 6, "narrow": 3}
"""Small maps in a row."""
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
Track = list[tuple[float, float, str]]
Cells = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One value a row, as bars on a scale.

    Attributes:
        title: What the values are.
        values: One for each row, or None for a row without.
        show: How a value is written.
        kind: Class of the bars: ``adapter`` or ``base``.
        reach: Largest absolute value on the scale.
        signed: Negative values go to the left of the middle.
    """

    title: str
    values: Sequence[float | None]
    show: Callable[[float], str]
    kind: str = "adapter"
    reach: float = 1.0
    signed: bool = False


def row_bars(title: str, rows: Sequence[str], panels: Sequence[Panel]) -> Markup:
    """Return bars for each row, one panel beside the other.

    Args:
        title: What the chart shows.
        rows: The name of each row.
        panels: The values; all have as many as there are rows.
    """
    said = [f"{row}: {', '.join(_told(panel, at))}" for at, row in enumerate(rows) for panel in panels]
    return join(_bars(title, rows, panels, size, "; ".join(said)) for size in SIZES)


def _told(panel: Panel, at: int) -> list[str]:
    value = panel.values[at]
    return [] if value is None else [f"{panel.title} {panel.show(value)}"]


def _bars(title: str, rows: Sequence[str], panels: Sequence[Panel], size: str, said: str) -> Markup:
    width = SIZES[size]
    names = [shortened(row, 0.36 * width) for row in rows]
    left = 8 + max((text_width(name, TICK_SIZE) for name in names), default=0.0)
    room = (width - left - GAP * (len(panels) - 1) - 4) / len(panels)
    bottom = TOP + ROW * len(rows)
    frame = Frame(width, bottom + BOTTOM, Box(left, TOP, width, bottom))
    parts = [label(name, left - 8, TOP + ROW * at + 14, "tick", "end") for at, name in enumerate(names)]
    track: Track = []
    for number, panel in enumerate(panels):
        start = left + number * (room + GAP)
        reach = max(panel.reach, 1e-12)
        scale = Linear(-reach if panel.signed else 0.0, reach, start, start + room)
        parts.append(label(panel.title, start, 14, "axis-title"))
        for tick in (-reach, 0.0, reach) if panel.signed else (0.0, reach):
            parts.append(line(scale(tick), TOP, scale(tick), bottom, "grid" if tick else "base"))
            anchor = "start" if tick == scale.low else "end" if tick == reach else "middle"
            parts.append(label(panel.show(tick), scale(tick), bottom + 16, "tick", anchor))
        for at, value in enumerate(panel.values):
            if value is not None:
                low, high = sorted((scale(0.0), scale(value)))
                parts.append(rect(low, TOP + ROW * at + 4, max(high - low, 0.8), ROW - 8, f"bar-{panel.kind}"))
    for at, row in enumerate(rows):
        told = [f"{panel.title}\t{panel.show(value)}" for panel in panels if (value := panel.values[at]) is not None]
        track.append((px_of(left), px_of(TOP + ROW * (at + 0.5)), "\n".join([row or "(empty)", *told])))
    return _chart(frame, parts, track, size, title, said)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Cells,
    *,
    apart: int = 0,
    show: Callable[[float], str] = lambda value: f"{value:.3f}",
) -> Markup:
    """Return a map of shares, 0 to 1: the darker, the larger.

    Args:
        title: What it shows.
        rows: Name of each row.
        columns: Name of each column.
        cells: One row of values for each.
        apart: The first columns, which have a colour of their own and stand apart.
        show: How a value is written.
    """
    largest = sorted(
        ((value, row, column) for row, ones in enumerate(cells) for column, value in enumerate(ones)), reverse=True
    )[:5]
    said = "The largest: " + "; ".join(f"{rows[row]}, {columns[at]}: {show(value)}" for value, row, at in largest)
    return join(_heat(title, rows, columns, cells, apart, show, size, said) for size in SIZES)


def _heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Cells,
    apart: int,
    show: Callable[[float], str],
    size: str,
    said: str,
) -> Markup:
    width = SIZES[size]
    names = [shortened(row, 0.28 * width) for row in rows]
    above = [shortened(column, 84) for column in columns]
    left = 8 + max((text_width(name, TICK_SIZE) for name in names), default=0.0)
    gap = 6.0 if apart else 0.0
    across = min(24.0, (width - left - gap - 4) / max(len(columns), 1))
    down = max(13.0, min(across, 20.0))
    every = max(1, math.ceil(13.0 / across))
    top = 8 + max((text_width(name, TICK_SIZE) for name in above), default=0.0)
    bottom = top + down * len(rows)
    frame = Frame(width, bottom + 6, Box(left, top, width, bottom))

    def x(column: int) -> float:
        return left + across * column + (gap if column >= apart else 0.0)

    parts = [label(name, left - 6, top + down * at + down / 2 + 4, "tick", "end") for at, name in enumerate(names)]
    for column in range(0, len(columns), every):
        middle = x(column) + across / 2 + 4
        turned = f"translate({px(middle)} {px(top - 5)}) rotate(-90)"
        parts.append(tag("text", above[column], class_="tick", transform=turned))
    parts += shades(cells, x, top, across, down, apart)
    track: Track = [
        (px_of(x(column) + across / 2), px_of(top + down * (row + 0.5)), f"{rows[row]}\n{columns[column]}\t{show(one)}")
        for row, ones in enumerate(cells)
        for column, one in enumerate(ones)
        if one >= LEVELS[0]
    ]
    return _chart(frame, parts, track, size, title, said)


def small_maps(title: str, names: Sequence[str], maps: Sequence[Cells], tips: Sequence[str], *, apart: int) -> Markup:
    """Return small heat maps side by side, one for each head of a layer.

    Args:
        title: What they show.
        names: The name of each map.
        maps: Its cells; all have the same size.
        tips: What is said of each, lines of ``name<tab>value``.
        apart: As for `heat_map`.
    """
    said = "; ".join(tip.replace("\t", ": ").replace("\n", ", ") for tip in tips)
    drawn = []
    for size, width in SIZES.items():
        columns = len(maps[0][0])
        gap = 3.0 if apart else 0.0
        room = (width - GAP * (HEADS[size] - 1)) / HEADS[size]
        cell = (room - gap) / max(columns, len(maps[0]))
        height = 20 + cell * len(maps[0]) + GAP
        lines = math.ceil(len(maps) / HEADS[size])
        frame = Frame(width, height * lines, Box(0, 0, width, height * lines))
        parts: list[Markup] = []
        track: Track = []
        for at, (name, cells, tip) in enumerate(zip(names, maps, tips, strict=True)):
            left, top = (at % HEADS[size]) * (room + GAP), (at // HEADS[size]) * height + 20

            def x(column: int, left: float = left, cell: float = cell, gap: float = gap) -> float:
                return left + cell * column + (gap if column >= apart else 0.0)

            parts.append(label(name, left, top - 6, "tick"))
            parts.append(rect(left, top, x(columns) - left, cell * len(cells), "map"))
            parts += shades(cells, x, top, cell, cell, apart)
            track.append((px_of(left + 4), px_of(top + 4), tip))
        drawn.append(_chart(frame, parts, track, size, title, said))
    return join(drawn)


def shades(cells: Cells, x: Callable[[int], float], top: float, across: float, down: float, apart: int) -> list[Markup]:
    """Return the cells of a heat map: one path for each shade, and nothing for those that are nearly zero.

    A cell is a line as wide as its row is high, and neighbours of one shade are one line: pages stay small.
    """
    steps: dict[tuple[bool, int], list[str]] = {}
    for row, ones in enumerate(cells):
        kinds = [(column < apart, sum(value >= limit for limit in LEVELS)) for column, value in enumerate(ones)]
        for kind, run in groupby(range(len(kinds)), kinds.__getitem__):
            columns = list(run)
            if kind[1]:
                start = f"M{px(x(columns[0]))} {px(top + down * (row + 0.5))}"
                steps.setdefault(kind, []).append(f"{start}h{px(across * len(columns))}")
    return [
        tag("path/", d="".join(d), stroke_width=px(down), class_=f"shade {'virtual' if its else 'text'} shade-{level}")
        for (its, level), d in steps.items()
    ]


def rect(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    """Return a rectangle, in pixels."""
    return tag("rect/", x=px(x), y=px(y), width=px(width), height=px(height), class_=class_)


def shortened(name: str, most: float) -> str:
    """Return a name that is no wider than so many pixels: what is left are the number of a layer, and the end.

    Example:
        >>> name = "encoder.layer.0.attention.output.dense"
        >>> shortened(name, 160), shortened(name, 100)
        ('0.attention.output.dense', '0…output.dense')
    """
    if text_width(name, TICK_SIZE) <= most:
        return name
    number = _NUMBER.search(name)
    head, rest = (number[1], name[number.end() :]) if number else ("", name)
    if head and text_width(f"{head}.{rest}", TICK_SIZE) <= most:
        return f"{head}.{rest}"
    while rest and text_width(f"{head}…{rest}", TICK_SIZE) > most:
        rest = rest[1:]
    return f"{head}…{rest.lstrip('.')}"


def px_of(value: float) -> float:
    """Return a coordinate to a tenth of a pixel."""
    return round(value, 1)


def _chart(frame: Frame, parts: list[Markup], track: Track, size: str, title: str, said: str) -> Markup:
    cursor = tag("g", line(0, 0, 0, 0, "cursor-line"), circle(0, 0, 4.5, "cursor-dot"), class_="cursor")
    return svg(
        frame,
        tag("title", title),
        tag("desc", said),
        *parts,
        cursor,
        class_=f"chart {size}",
        role="img",
        tabindex="0",
        data_track=json.dumps(track, ensure_ascii=False, separators=(",", ":")),
        aria_label=f"{title}. {said}. Arrow keys read single values.",
    )
