"""Resampling, vectorised: draws of rows as weights, and the metrics as functions of weights.

A bootstrap draw of n rows is a vector of counts that sum to n. Every metric here is a function of such counts, so a
thousand draws are one (draws, kinds) matrix and a metric over all of them is a matrix product or a cumulative sum,
never a Python loop over draws. Rows that a metric cannot tell apart are one *kind*: accuracy and F1 see only (target,
predicted), so their draws are multinomial counts of the cells of the confusion matrix, which has the same law as
drawing the rows and is as cheap for a million rows as for a hundred.

Source of the scheme: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
Legend: R draws, K kinds, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Weights (R, K) in, one value a draw (R,) out; nan where the draw leaves the metric undefined."""

BLOCK = 4_000_000
"""Weights held at once: 32 MB."""


def kinds(*columns: NDArray[Any]) -> tuple[tuple[NDArray[Any], ...], Ints]:
    """Return the K distinct rows of integer columns (n,) as columns (K,), and the number of each (K,)."""
    distinct, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    return tuple(distinct.T), counts.astype(np.int64)


def draw_counts(counts: Ints, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield bootstrap counts in blocks (<= R, K), R draws in all.

    Each draw sums to the number of rows.
    """
    n, size = int(counts.sum()), len(counts)
    single = size == n
    block = max(1, BLOCK // max(size, 1))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        if single:
            # Drawing n rows out of n one by one is several times faster than numpy's multinomial over n cells.
            drawn = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
            yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        else:
            yield rng.multinomial(n, counts / n, size=rows).astype(np.float64)


def resample(counts: Ints, statistics: Sequence[Statistic], resamples: int, rng: np.random.Generator) -> Floats:
    """Return each statistic over the same R resamples, (len(statistics), R)."""
    blocks = [np.stack([f(weights) for f in statistics]) for weights in draw_counts(counts, resamples, rng)]
    return np.concatenate(blocks, axis=1)


def accuracy(targets: Ints, predicted: Ints) -> Statistic:
    """Return the statistic of accuracy, 0 to 1, from ``targets`` and ``predicted``, both (K,)."""
    right = (targets == predicted).astype(np.float64)
    return lambda weights: weights @ right / weights.sum(axis=1)


def f1(targets: Ints, predicted: Ints, classes: int, average: Literal["macro", "weighted"]) -> Statistic:
    """Return the statistic of F1, 0 to 1, over classes.

    Macro is the plain mean over the classes that a draw has as a target or as a prediction, as scikit-learn does by
    default; weighted is the mean over targets.

    Args:
        targets: (K,) class ids.
        predicted: (K,) class ids.
        classes: C.
        average: The mean over classes.
    """
    is_target = np.eye(classes)[targets]
    is_predicted = np.eye(classes)[predicted]
    both = is_target * is_predicted

    def statistic(weights: Floats) -> Floats:
        hits, wanted, given = weights @ both, weights @ is_target, weights @ is_predicted
        seen = wanted + given
        score = np.divide(2 * hits, seen, out=np.zeros_like(seen), where=seen > 0)
        shares = wanted if average == "weighted" else (seen > 0).astype(np.float64)
        result: Floats = (score * shares).sum(axis=1) / shares.sum(axis=1)
        return result

    return statistic


def rank_auc(positive: NDArray[np.bool_], scores: Floats) -> Statistic:
    """Return the statistic of the area under the ROC curve of one class against the rest, by ranks.

    The area is P(score of a positive > score of a negative) + P(tie)/2. The rows are sorted once; a draw then costs two
    sums over tied groups and one cumulative sum. Undefined (nan) where a draw has no positive or no negative row.

    Args:
        positive: (K,) True for rows of the class.
        scores: (K,) scores of the class.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    is_positive = positive[order].astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        ranked = weights[:, order]
        above = np.add.reduceat(ranked * is_positive, starts, axis=1)
        below = np.add.reduceat(ranked, starts, axis=1) - above
        wins = (above * (np.cumsum(below, axis=1) - 0.5 * below)).sum(axis=1)
        pairs = above.sum(axis=1) * below.sum(axis=1)
        result: Floats = np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)
        return result

    return statistic


def roc_auc(targets: Ints, scores: Floats) -> Statistic:
    """Return the statistic of the area under the ROC curve, 0 to 1.

    For two classes it is that of the second, for more the plain mean over classes, each against the rest; nan where a
    class is absent.

    Args:
        targets: (K,) class ids.
        scores: (K, C) scores.
    """
    classes = scores.shape[1]
    if classes == 2:
        return rank_auc(targets == 1, scores[:, 1])
    each = [rank_auc(targets == c, scores[:, c]) for c in range(classes)]
    return lambda weights: np.mean([f(weights) for f in each], axis=0)


def percentile_interval(draws: Floats, confidence: float) -> tuple[float, float]:
    """Return the bounds of the central `confidence` share of the resamples, nan left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)
