"""Names beside the points they belong to, none over another, over a point or over an interval.

A name first tries the places right beside its point; where all are taken, the nearest free place anywhere in the chart,
with a thin line to its point. A chart that is full leaves names out, so that the page can say so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WIDE = "mwMWOQG@%&"
_NARROW = "iljtfrI.,:;'|!()[] "
SAFETY = 1.06
"""Fonts differ; metrics are those of Helvetica."""
GAP = 9.0
"""Pixels between a point's middle and its name."""
GRID = 10.0
MOST_LED = 24
"""With more names than this, lines to far-away names would be a thicket, and looking for places takes long."""
AWAY = 16.0
"""Pixels that a name with a line keeps from other points."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards, so that ``top`` is the smaller."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return True if the two boxes have an area in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Return True if the box lies inside another, borders included."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Placed:
    """A name's place: its box, and the point that it may need a line to."""

    box: Box
    led: bool

    def line_end(self, x: float, y: float) -> tuple[float, float]:
        """Return the point at which a line from ``(x, y)`` meets the name's box."""
        box = self.box
        return min(max(x, box.left), box.right), min(max(y, box.top + 2), box.bottom - 2)


def text_width(text: str, size: float) -> float:
    """Return the width in pixels of a line of sans-serif text of a font size, rather too large than too small."""
    return SAFETY * size * sum(_character(character) for character in text)


def cut(text: str, most: int) -> str:
    """Truncate a text to a number of characters, the last an ellipsis if some are missing."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    area: Box,
) -> list[Placed | None]:
    """Place names beside their points without overlap.

    Args:
        points: The points, (x, y) in pixels.
        sizes: Width and height of each name in pixels.
        obstacles: Boxes that names must not cover.
        area: Box that names must not leave.

    Returns:
        The place of each name, or None for a name that does not fit anywhere.
    """
    found: list[Placed | None] = [None] * len(points)
    taken = list(obstacles)

    def crowd(index: int) -> tuple[float, int]:
        x, y = points[index]
        near = sum(abs(other[0] - x) < 90 and abs(other[1] - y) < 30 for other in points)
        return (-near, index)

    for index in sorted(range(len(points)), key=crowd):
        spare: Placed | None = None
        for placed in _candidates(points[index], sizes[index], area, led=len(points) <= MOST_LED):
            if not placed.box.within(area) or any(placed.box.overlaps(other) for other in taken):
                continue
            if _plain_whose(placed, points, index):
                found[index] = placed
                break
            if placed.led and spare is None:
                spare = placed
        found[index] = placed_here = found[index] or spare
        if placed_here is not None:
            taken.append(placed_here.box)
    return found


def _plain_whose(placed: Placed, points: Sequence[tuple[float, float]], index: int) -> bool:
    """Return True if a reader would not mistake the name for that of another point."""
    own = _distance(placed.box, *points[index])
    others = [_distance(placed.box, *point) for place, point in enumerate(points) if place != index]
    return all(other > (AWAY**2 if placed.led else own) for other in others)


def _distance(box: Box, x: float, y: float) -> float:
    """Return the squared distance from a point to a box."""
    dx = max(box.left - x, x - box.right, 0.0)
    dy = max(box.top - y, y - box.bottom, 0.0)
    return dx * dx + dy * dy


def _candidates(point: tuple[float, float], size: tuple[float, float], area: Box, *, led: bool) -> Iterator[Placed]:
    (x, y), (width, height) = point, size
    middle = y - height / 2
    for left, top in (
        (x + GAP, middle),
        (x - GAP - width, middle),
        (x + GAP, middle - height * 0.7),
        (x + GAP, middle + height * 0.7),
        (x - GAP - width, middle - height * 0.7),
        (x - GAP - width, middle + height * 0.7),
        (x - width / 2, y - GAP - height),
        (x - width / 2, y + GAP),
    ):
        yield Placed(Box(left, top, left + width, top + height), False)
    if not led:
        return
    columns = int((area.right - area.left - width) // GRID) + 1
    rows = int((area.bottom - area.top - height) // GRID) + 1
    grid = [
        (area.left + column * GRID, area.top + row * GRID)
        for column in range(max(columns, 0))
        for row in range(max(rows, 0))
    ]

    def far(corner: tuple[float, float]) -> float:
        left, top = corner
        dx = left - x if left > x else max(x - left - width, 0.0)
        dy = top - y if top > y else max(y - top - height, 0.0)
        return dx * dx + dy * dy

    for left, top in sorted(grid, key=far):
        yield Placed(Box(left, top, left + width, top + height), True)


def _character(character: str) -> float:
    """Return the width of a character over the font size."""
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    if unicodedata.combining(character):
        return 0.0
    if character in _WIDE:
        return 0.85
    if character in _NARROW:
        return 0.34
    if character.isupper():
        return 0.72
    return 0.57
