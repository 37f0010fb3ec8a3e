"""Recall and reciprocal rank: how near the text is that belongs to another, among the second texts of all rows.

The candidates stay the same in every bootstrap draw: other rows are asked, among the same texts.

Legend: R draws, n rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graftwerk.evaluation.bootstrap import Statistic
from graftwerk.tasks.vector_predictions import SimilarityPredictions

Value = Callable[[SimilarityPredictions], float]


def recall(most: int) -> tuple[Value, Callable[[SimilarityPredictions], Statistic]]:
    """Return recall at ``most``, the share of rows whose own text is among so many nearest, and its statistic."""

    def statistic(predictions: SimilarityPredictions) -> Statistic:
        return _mean((predictions.ranks <= most).astype(np.float64))

    return lambda predictions: float((predictions.ranks <= most).mean()), statistic


def reciprocal_rank(predictions: SimilarityPredictions) -> float:
    """Return the mean of one over the rank of each row's own text."""
    return float((1 / predictions.ranks).mean())


def reciprocal_rank_statistic(predictions: SimilarityPredictions) -> Statistic:
    """Return the mean reciprocal rank as a function of bootstrap weights (R, n)."""
    return _mean(1 / predictions.ranks)


def _mean(values: np.ndarray) -> Statistic:
    return lambda weights: weights @ values / weights.sum(axis=1)
