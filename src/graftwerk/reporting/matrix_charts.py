"""Charts of rows and cells: bars of one or more values a row, heat maps, and small heat maps side by side.

Each comes in two widths, is one stop of the tab key, and is read cell by cell by the pointer or the arrow keys. The
cells of a map are drawn once, in units of cells; both widths show that drawing, enlarged (`shared`). The script reads
a map's values in the table beneath it, and of other charts the narrow one has the words of the wide one: pages stay
small.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

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
    told = [
        "\n".join(
            [
                row or "(empty)",
                *(f"{panel.title}\t{panel.show(value)}" for panel in panels if (value := panel.values[at]) is not None),
            ]
        )
        for at, row in enumerate(rows)
    ]
    return join(_bars(title, rows, panels, size, "; ".join(said), told) for size in SIZES)


def _told(panel: Panel, at: int) -> list[str]:
    value = panel.values[at]
    return [] if value is None else [f"{panel.title} {panel.show(value)}"]


def _bars(
    title: str, rows: Sequence[str], panels: Sequence[Panel], size: str, said: str, told: Sequence[str]
) -> Markup:
    width = SIZES[size]
    names = [shortened(row, 0.36 * width) for row in rows]
    left = 8 + max((text_width(name, TICK_SIZE) for name in names), default=0.0)
    room = (width - left - GAP * (len(panels) - 1) - 4) / len(panels)
    bottom = TOP + ROW * len(rows)
    frame = Frame(width, bottom + BOTTOM, Box(left, TOP, width, bottom))
    words = [tag("text", name, y=px(TOP + ROW * at + 14)) for at, name in enumerate(names)]
    parts = [tag("g", *words, class_="tick", text_anchor="end", transform=f"translate({px(left - 8)})")]
    for number, panel in enumerate(panels):
        start = left + number * (room + GAP)
        reach = max(panel.reach, 1e-12)
        scale = Linear(-reach if panel.signed else 0.0, reach, start, start + room)
        parts.append(label(panel.title, start, 14, "axis-title"))
        for tick in (-reach, 0.0, reach) if panel.signed else (0.0, reach):
            parts.append(line(scale(tick), TOP, scale(tick), bottom, "grid" if tick else "base"))
            anchor = "start" if tick == scale.low else "end" if tick == reach else "middle"
            parts.append(label(panel.show(tick), scale(tick), bottom + 16, "tick", anchor))
        bars = [
            (min(scale(0.0), scale(value)), TOP + ROW * (at + 0.5), max(abs(scale(value) - scale(0.0)), 0.8))
            for at, value in enumerate(panel.values)
            if value is not None
        ]
        d = "".join(f"M{px(x)} {px(y)}h{px(width)}" for x, y, width in bars)
        parts.append(tag("path/", d=d, stroke_width=px(ROW - 8), class_=f"bar-{panel.kind}"))
    places = [(left, TOP + ROW * (at + 0.5)) for at in range(len(rows))]
    return _chart(frame, parts, size, title, said, places, told)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Cells,
    table: str,
    *,
    apart: int = 0,
    show: Callable[[float], str] = lambda value: f"{value:.3f}",
    unit: str = "",
    labels: set[str] | None = None,
) -> Markup:
    """Return a map of shares, 0 to 1: the darker, the larger.

    Args:
        title: What it shows.
        rows: Name of each row.
        columns: Name of each column.
        cells: One row of values for each.
        table: Id of the table of these values, in which they are read out.
        apart: The first columns, which have a colour of their own and stand apart.
        show: How a value is written.
        unit: What stands behind a number of the table when it is read out; `%` for percent.
        labels: Ids of names that the page has: they are used again, and new ones are added.
    """
    largest = sorted(
        ((value, row, column) for row, ones in enumerate(cells) for column, value in enumerate(ones)), reverse=True
    )[:5]
    said = "The largest: " + "; ".join(f"{rows[row]}, {columns[at]}: {show(value)}" for value, row, at in largest)
    key, parts = shared(title, cells, apart)
    words = {"data_table": table, "data_unit": unit, "data_least": f"{LEVELS[0] * (100 if '%' in unit else 1):g}"}
    return join(
        _heat(
            title,
            rows,
            columns,
            apart,
            size,
            said,
            key,
            words,
            set() if labels is None else labels,
            *([tag("defs", *parts)] if size == "wide" else []),
        )
        for size in SIZES
    )


def _heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    apart: int,
    size: str,
    said: str,
    key: str,
    words: Mapping[str, str],
    labels: set[str],
    *drawing: Markup,
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
    beside = [tag("text", name, y=px(down * (at + 0.5) + 4)) for at, name in enumerate(names)]
    turned = [
        tag("text", above[column], y=px(across * (column + 0.5) + (gap if column >= apart else 0.0) + 4))
        for column in range(0, len(columns), every)
    ]
    names_id = f"n{digest((names, above, size, apart))}"
    around: list[Markup] = [
        tag("g", *beside, class_="tick", text_anchor="end", transform=f"translate({px(left - 6)} {px(top)})"),
        tag("g", *turned, class_="tick", transform=f"translate({px(left)} {px(top - 5)}) rotate(-90)"),
    ]
    parts = [
        *drawing,
        tag("use/", href=f"#{names_id}") if names_id in labels else tag("g", *around, id=names_id),
        uses([key], [(left, top)], across, down, apart, gap),
    ]
    labels.add(names_id)
    grid = " ".join(f"{value:g}" for value in (px_of(left), px_of(top), round(across, 3), down, gap, apart))
    return _chart(frame, parts, size, title, said, data={"data_grid": grid, **words})


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
    own = [shared(f"{title} {name}", cells, apart, "map") for name, cells in zip(names, maps, strict=True)]
    drawn = []
    for size, width in SIZES.items():
        columns = len(maps[0][0])
        gap = 3.0 if apart else 0.0
        room = (width - GAP * (HEADS[size] - 1)) / HEADS[size]
        cell = (room - gap) / max(columns, len(maps[0]))
        height = 20 + cell * len(maps[0]) + GAP
        lines = math.ceil(len(maps) / HEADS[size])
        frame = Frame(width, height * lines, Box(0, 0, width, height * lines))
        parts = [tag("defs", *(part for _, both in own for part in both))] if size == "wide" else []
        across = HEADS[size]
        corners = [((at % across) * (room + GAP), (at // across) * height + 20) for at in range(len(maps))]
        words = [tag("text", name, x=px(x), y=px(y - 6)) for name, (x, y) in zip(names, corners, strict=True)]
        parts += [tag("g", *words, class_="tick"), uses([key for key, _ in own], corners, cell, cell, apart, gap)]
        drawn.append(_chart(frame, parts, size, title, said, [(x + 4, y + 4) for x, y in corners], tips))
    return join(drawn)


def shared(title: str, cells: Cells, apart: int, behind: str | None = None) -> tuple[str, list[Markup]]:
    """Return the key of a map and its drawings for `uses`: columns that stand apart, if there are any, and the others.

    A unit is a cell. Cells of one shade or a darker one, below each other, are one line as wide as a column; the darker
    ones are drawn on top of it, and nothing where the value is nearly zero.

    Args:
        title: What is drawn, for the key.
        cells: As for `heat_map`.
        apart: As for `heat_map`.
        behind: Class of a rectangle behind the cells, or None for none.
    """
    key = f"m{digest((title, cells))}"
    parts = []
    for kind, first, last in (("virtual", 0, apart), ("text", apart, len(cells[0]))):
        if first == last:
            continue
        lines = [] if behind is None else [tag("rect/", x="-.5", width=last - first, height=len(cells), class_=behind)]
        for level, limit in enumerate(LEVELS, start=1):
            if d := _lines([[ones[column] >= limit for ones in cells] for column in range(first, last)]):
                lines.append(tag("path/", d=d, class_=f"shade-{level}"))
        parts.append(tag("g", *lines, id=f"{key}{kind[0]}", class_=f"shade {kind}"))
    return key, parts


def _lines(columns: Sequence[Sequence[bool]]) -> str:
    """Return the runs of true values of each column as vertical lines, each begun from the end of the one before."""
    d, x, y = "", 0, 0
    for column, marks in enumerate(columns):
        at = 0
        for mark, run in groupby(marks):
            length = len(list(run))
            if mark:
                d += f"m{column - x} {at - y}v{length}".replace(" -", "-")
                x, y = column, at + length
            at += length
    return d


def uses(
    keys: Sequence[str], corners: Sequence[tuple[float, float]], across: float, down: float, apart: int, gap: float
) -> Markup:
    """Return drawings of `shared`, each with its corner at a place in pixels: a cell is so many across and down."""
    drawn = []
    for key, (left, top) in zip(keys, corners, strict=True):
        places = [("v", left)] * bool(apart) + [("t", left + across * apart + gap)]
        drawn += [
            tag("use/", href=f"#{key}{kind}", x=f"{x / across + 0.5:.2f}", y=f"{top / down:.2f}") for kind, x in places
        ]
    return tag("g", *drawn, transform=f"scale({across:.3f} {down:.3f})")


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


def _chart(
    frame: Frame,
    parts: Sequence[Markup],
    size: str,
    title: str,
    said: str,
    places: Sequence[tuple[float, float]] = (),
    told: Sequence[str] = (),
    data: Mapping[str, str] = MappingProxyType({}),
) -> Markup:
    """Return a chart; the narrow one refers to what the wide one says."""
    key, cursor = (
        f"c{digest((title, said))}",
        tag("g", line(0, 0, 0, 0, "cursor-line"), circle(0, 0, 4.5, "cursor-dot"), class_="cursor"),
    )
    wide = size == "wide"
    if places:
        where = {"data_places": " ".join(f"{px(x)} {px(y)}" for x, y in places)}
        data = where | ({"data_told": "\n\n".join(told), "id": key} if wide else {"data_of": key})
    return svg(
        frame,
        tag("title", title),
        tag("desc", f"{said if wide else title}. Arrow keys read single values.", id=f"{key}d" if wide else None),
        *parts,
        cursor,
        class_=f"chart {size}",
        role="img",
        tabindex="0",
        aria_label=title,
        aria_describedby=None if wide else f"{key}d",
        **data,
    )


def digest(values: object) -> str:
    """Return eight hexadecimal digits that tell values from others, for ids."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]
