"""Metrics of several data sets, data set by data set."""

from __future__ import annotations

from typing import Any

from graftwerk.evaluation.metric import names_in
from graftwerk.evaluation.metrics import metrics_of
from graftwerk.tasks.predictions import Predictions, TextPredictions


def metrics_by_set(predictions: Predictions, **options: Any) -> dict[str, Any]:
    """Return `metrics_of` of each data set's rows, by its name; empty if there is one data set."""
    if not isinstance(predictions, TextPredictions):
        return {}
    return {name: metrics_of(predictions.of_set(name), **options) for name in names_in(predictions)}
