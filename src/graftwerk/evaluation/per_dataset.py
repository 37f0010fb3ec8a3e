"""Figures of several data sets: each metric set by set, and their mean, in which a small set counts as much as a large
one (macro mean).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwerk.tasks.predictions import Predictions, TextPredictions

if TYPE_CHECKING:
    from graftwerk.evaluation.metrics import Metric


def names_in(predictions: Predictions) -> list[str]:
    """The sets that rows are of, in order; none where there is one data set."""
    sets = predictions.sets if isinstance(predictions, TextPredictions) else None
    return list(dict.fromkeys(sets or ()))


def over_sets(metric: Metric) -> Metric:
    """The metric that is the same for one data set, and for several their mean."""
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


def metrics_by_set(predictions: Predictions, **options: Any) -> dict[str, Any]:
    """`metrics_of` for each set's rows, by the set's name; empty where there is one data set."""
    from graftwerk.evaluation.metrics import metrics_of

    if not isinstance(predictions, TextPredictions):
        return {}
    return {name: metrics_of(predictions.of_set(name), **options) for name in names_in(predictions)}
