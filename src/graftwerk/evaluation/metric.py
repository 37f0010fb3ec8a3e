"""One metric: its value on predictions, its statistic for the bootstrap, and its macro mean over several data sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from graftwerk.evaluation.bootstrap import Statistic
from graftwerk.tasks.predictions import Predictions, TextPredictions


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        title: Name for display.
        unit: ``share`` (0 to 1), ``points`` (0 to 100), ``correlation`` (-1 to 1), ``score`` (the unit of the rows'
            numbers), ``tokens``, or ``nats`` (perplexity: their exponential).
        higher: True if higher is better, False if lower is better, or None if neither is.
        statistic: Function from predictions to the metric as a function of row weights (R, n); nan if it is undefined.
        defined: Function that says if predictions have what the metric needs.
        signature: Function to the versions and options of the computation, or None.
        cells: True if the metric depends on the confusion matrix only.
        by_class: True if every class has the same weight, whatever its number of rows.
        package: Optional package that the metric needs, or None.
        caution: Function to a warning that the value is misleading on these predictions, or to None.
    """

    title: str
    unit: Literal["share", "points", "correlation", "score", "tokens", "nats"]
    higher: bool | None
    statistic: Callable[[Any], Statistic]
    defined: Callable[[Predictions], bool]
    signature: Callable[[Any], str] | None = None
    cells: bool = False
    by_class: bool = False
    package: str | None = None
    caution: Callable[[Any], str | None] = lambda predictions: None

    def value(self, predictions: Any) -> float | None:
        """Return the value over all rows, or None if it is undefined on them."""
        value = float(self.statistic(predictions)(np.ones((1, predictions.rows)))[0])
        return value if math.isfinite(value) else None

    @property
    def scale(self) -> float:
        """Return the factor for display: 100 for shares, which are shown in percent, and correlations, else 1."""
        return 100.0 if self.unit in ("share", "correlation") else 1.0

    @property
    def words(self) -> str:
        """Return the unit of a difference for display, with a leading space, or "" if it has none."""
        return {"share": " points", "points": " points", "correlation": " points", "tokens": " words"}.get(
            self.unit, ""
        )

    def text(self, value: float, *, signed: bool = False) -> str:
        """Format a value or a difference for display, at the metric's scale.

        Args:
            value: The value.
            signed: True for a difference: with its sign, a true minus, and no -0.0.
        """
        shown = abs(value) if signed else value
        text = f"{self.scale * shown:.1f}"
        if self.unit == "score":
            text = f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:.3g}"
        if not signed or not text.strip("0."):
            return text
        return f"+{text}" if value > 0 else f"\N{MINUS SIGN}{text}"

    def better(self, value: float, other: float) -> float:
        """Return by how much a value is better than another; negative if it is worse."""
        return other - value if self.higher is False else value - other

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest value that the metric can have."""
        known = {"share": (0.0, 1.0), "points": (0.0, 100.0), "correlation": (-1.0, 1.0)}
        return known.get(self.unit, (0.0, math.inf))


def names_in(predictions: Predictions) -> list[str]:
    """Return the names of the data sets that rows are of, in order; empty if there is one data set."""
    sets = predictions.sets if isinstance(predictions, TextPredictions) else None
    return list(dict.fromkeys(sets or ()))


def over_sets(metric: Metric) -> Metric:
    """Return the metric that is the same for one data set, and the macro mean for several."""
    statistic_of = metric.statistic

    def statistic(predictions: Any) -> Any:
        names = names_in(predictions)
        if not names:
            return statistic_of(predictions)
        sets = np.asarray(predictions.sets)
        each = [(np.flatnonzero(sets == name), statistic_of(predictions.of_set(name))) for name in names]
        return lambda weights: np.mean([of_set(weights[:, rows]) for rows, of_set in each], axis=0)

    return replace(metric, statistic=statistic)
