"""Recall and reciprocal rank: how near the text is that belongs to another, among the second texts of all rows.

The candidates stay the same in every bootstrap draw: other rows are asked, among the same texts.

Legend: R draws, n rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graftwerk.evaluation.bootstrap import Statistic, mean_over_rows
from graftwerk.tasks.vector_predictions import SimilarityPredictions


def recall(most: int) -> Callable[[SimilarityPredictions], Statistic]:
    """Return recall at ``most``, the share of rows whose own text is among so many nearest."""
    return lambda predictions: mean_over_rows((predictions.ranks <= most).astype(np.float64))


def reciprocal_rank(predictions: SimilarityPredictions) -> Statistic:
    """Return the mean of one over the rank of each row's own text, over bootstrap weights (R, n)."""
    return mean_over_rows(1 / predictions.ranks)
