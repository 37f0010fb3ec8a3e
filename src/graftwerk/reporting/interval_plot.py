"""Small drawings within table rows, all on one scale: a value, its interval and each seed; a difference beside zero."""

from __future__ import annotations

from collections.abc import Sequence

from graftwerk.reporting.escape import Markup
from graftwerk.reporting.frame import Frame, circle, line, svg
from graftwerk.reporting.labels import Box
from graftwerk.reporting.scales import Linear, around

WIDTH, HEIGHT = 190.0, 26.0
EDGE = 8.0
MIDDLE = HEIGHT / 2
_FRAME = Frame(WIDTH, HEIGHT, Box(EDGE, 0, WIDTH - EDGE, HEIGHT))


def scale_of(values: Sequence[float | None], *, zero: bool = False) -> Linear:
    """Return one scale for all rows of a table.

    Args:
        values: All that will be drawn; None is left out.
        zero: Zero is on it, too.
    """
    known = [value for value in values if value is not None]
    return around([*known, 0.0] if zero else known, EDGE, WIDTH - EDGE, least=0.01, margin=0.02)


def strip(
    scale: Linear,
    value: float,
    low: float | None,
    high: float | None,
    dots: Sequence[float] = (),
    *,
    zero: bool = False,
    kind: str = "",
    said: str = "",
) -> Markup:
    """Draw the interval of a row.

    Args:
        scale: Scale from values to pixels.
        value: The value, drawn as a large dot.
        low: Lower bound of the interval, or None if there is no interval.
        high: Upper bound, likewise.
        dots: Values of small dots: one per seed.
        zero: Draw a line at zero.
        kind: A class for the style sheet.
        said: The same in words.
    """
    return svg(
        _FRAME,
        line(scale(0.0), 0, scale(0.0), HEIGHT, "zero") if zero else None,
        line(scale(low), MIDDLE, scale(high), MIDDLE, "bar") if low is not None and high is not None else None,
        *(circle(scale(dot), MIDDLE, 2.6, "seed") for dot in dots),
        circle(scale(value), MIDDLE, 4.5, "dot"),
        class_=f"strip {kind}".strip(),
        role="img",
        aria_label=said,
    )
