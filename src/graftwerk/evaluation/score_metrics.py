"""Correlations and errors of predicted numbers, and ranks of the text that belongs to another.

What is undefined (a correlation with a constant) is nan. The candidates of a rank stay the same in every bootstrap
draw: other rows are asked, among the same texts.

Legend: R draws, n rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Statistic, mean_over_rows
from graftwerk.tasks.predictions import ScorePredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

Scored = ScorePredictions | SimilarityPredictions
"""Anything with a number for each row: also the cosines of pairs."""


def targets_of(predictions: Scored) -> Floats:
    """Return the right numbers (n,) of rows that all have one."""
    assert predictions.targets is not None  # `metrics.check` has refused rows without them
    return np.asarray(predictions.targets, dtype=np.float64)


def pearson(predictions: Scored) -> Statistic:
    """Return the linear correlation, -1 to 1, over weights (R, n); nan if all values or all targets are alike."""
    # Moved to a mean of zero: sums of squares of large numbers would lose their digits.
    x, y = (values - values.mean() for values in (predictions.values, targets_of(predictions)))  # (n,)
    return lambda weights: _correlation(weights, x[None], y[None])


def spearman(predictions: Scored) -> Statistic:
    """Return the correlation of the ranks within each draw, tied ones at their mean rank, over weights (R, n)."""
    of_values, of_targets = _Ranks(predictions.values), _Ranks(targets_of(predictions))
    return lambda weights: _correlation(weights, of_values(weights), of_targets(weights))


def rmse(predictions: Scored) -> Statistic:
    """Return the root of the mean squared error, in the unit of the targets, over weights (R, n)."""
    squared = (predictions.values - targets_of(predictions)) ** 2  # (n,)
    return lambda weights: np.sqrt(weights @ squared / weights.sum(axis=1))


def mae(predictions: Scored) -> Statistic:
    """Return the mean absolute error, in the unit of the targets, over weights (R, n)."""
    apart = np.abs(predictions.values - targets_of(predictions))  # (n,)
    return lambda weights: weights @ apart / weights.sum(axis=1)


def _correlation(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Return the weighted correlations (R,) of ``x`` and ``y``, (R, n) or (1, n); nan where one of them is constant."""
    total = weights.sum(axis=1, keepdims=True)  # (R, 1)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    both, xx, yy = ((weights * product).sum(axis=1) for product in (x * y, x * x, y * y))  # (R,)
    spread = np.sqrt(xx * yy)
    # What rounding leaves of equal numbers is no spread.
    known = np.minimum(xx, yy) > 1e-24 * total[:, 0] * max(1.0, float(np.abs(x).max(initial=0.0)))
    result: Floats = np.divide(both, spread, out=np.full_like(both, np.nan), where=known & (spread > 0))
    return np.clip(result, -1.0, 1.0)


class _Ranks:
    """Mean ranks of values in weighted draws; the values are sorted once.

    Args:
        values: (n,) numbers.
    """

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.starts = np.flatnonzero(new)
        self.group = np.empty(len(values), dtype=np.int64)
        self.group[self.order] = np.cumsum(new) - 1  # of each row, in its own place

    def __call__(self, weights: Floats) -> Floats:
        """Return the rank (R, n) of each row in each draw: rows below it, and half of those that tie with it."""
        tied = np.add.reduceat(weights[:, self.order], self.starts, axis=1)  # (R, groups)
        ranks: Floats = (np.cumsum(tied, axis=1) - tied + (tied + 1) / 2)[:, self.group]
        return ranks


def recall(most: int) -> Callable[[SimilarityPredictions], Statistic]:
    """Return recall at ``most``, the share of rows whose own text is among so many nearest, over weights (R, N)."""
    return lambda predictions: mean_over_rows((predictions.ranks <= most).astype(np.float64))


def reciprocal_rank(predictions: SimilarityPredictions) -> Statistic:
    """Return the mean of one over the rank of each row's own text, over bootstrap weights (R, n)."""
    return mean_over_rows(1 / predictions.ranks)
