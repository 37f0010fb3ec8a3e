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
        title: As people write it.
        unit: ``share`` (0 to 1), ``points`` (0 to 100), ``tokens``, or ``nats`` (perplexity: their exponential).
        higher: Whether more is better; None: neither.
        value: Of all rows; None where undefined on them.
        statistic: The same as a function of row weights (R, n).
        defined: Whether these predictions have what it needs.
        signature: With which versions and options it was computed.
        package: What has to be installed for it, beside what always is.
        cells: Whether it sees the confusion matrix alone.
        caution: What makes its value misleading on these predictions, or None.
        by_class: Whether every class counts the same in it, however few rows it has.
    """

    title: str
    unit: Literal["share", "points", "tokens", "nats"]
    higher: bool | None
    value: Callable[[Any], float | None]
    statistic: Callable[[Any], Statistic]
    defined: Callable[[Predictions], bool]
    signature: Callable[[Any], str] | None = None
    cells: bool = False
    by_class: bool = False
    package: str | None = None
    caution: Callable[[Any], str | None] = lambda predictions: None

    @property
    def scale(self) -> float:
        """What a value is multiplied by for people: shares become points (or per cent), all else is shown as it is."""
        return 100.0 if self.unit == "share" else 1.0

    @property
    def words(self) -> str:
        """What a difference is counted in, with a space before it."""
        return {"share": " points", "points": " points", "tokens": " words", "nats": ""}[self.unit]

    def better(self, value: float, other: float) -> float:
        """By how much a value is better than another; negative where it is worse."""
        return other - value if self.higher is False else value - other

    @property
    def bounds(self) -> tuple[float, float]:
        return {"share": (0.0, 1.0), "points": (0.0, 100.0)}.get(self.unit, (0.0, math.inf))


def names_in(predictions: Predictions) -> list[str]:
    """Return the names of the data sets that rows are of, in order; empty if there is one data set."""
    sets = predictions.sets if isinstance(predictions, TextPredictions) else None
    return list(dict.fromkeys(sets or ()))


def over_sets(metric: Metric) -> Metric:
    """Return the metric that is the same for one data set, and the macro mean for several."""
    value_of, statistic_of = metric.value, metric.statistic

    def value(predictions: Any) -> float | None:
        names = names_in(predictions)
        if not names:
            return value_of(predictions)
        values = [value_of(predictions.of_set(name)) for name in names]
        known = [each for each in values if each is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    def statistic(predictions: Any) -> Any:
        names = names_in(predictions)
        if not names:
            return statistic_of(predictions)
        sets = np.asarray(predictions.sets)
        each = [(np.flatnonzero(sets == name), statistic_of(predictions.of_set(name))) for name in names]
        return lambda weights: np.mean([of_set(weights[:, rows]) for rows, of_set in each], axis=0)

    return replace(metric, value=value, statistic=statistic)
