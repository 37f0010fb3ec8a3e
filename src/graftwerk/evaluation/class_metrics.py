"""Accuracy, F1 and ROC-AUC of classifications, as functions of bootstrap weights; tests hold them to scikit-learn.

Legend: R draws, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from graftwerk.evaluation.bootstrap import Floats, Ints, Statistic, kinds, mean_over_rows, share
from graftwerk.tasks.predictions import ClassPredictions


def targets_of(predictions: ClassPredictions) -> Ints:
    """Return the class ids (N,) of rows that all have one."""
    assert predictions.targets is not None  # `metrics.check` has refused rows without them
    return np.asarray(predictions.targets).astype(np.int64)


def accuracy(predictions: ClassPredictions) -> Statistic:
    """Return the share of rows whose class is predicted, 0 to 1, over weights (R, N)."""
    return mean_over_rows((targets_of(predictions) == predictions.scores.argmax(axis=1)).astype(np.float64))


def f1_macro(predictions: ClassPredictions) -> Statistic:
    """Return the plain mean of F1 over the classes that a draw has as a target or as a prediction, over weights (R, N).

    scikit-learn does so by default.
    """
    return _f1(predictions, lambda wanted, seen: (seen > 0).astype(np.float64))


def f1_weighted(predictions: ClassPredictions) -> Statistic:
    """Return the mean over rows of the F1 of their class, over weights (R, N)."""
    return _f1(predictions, lambda wanted, seen: wanted)


def _f1(predictions: ClassPredictions, weigh: Callable[[Floats, Floats], Floats]) -> Statistic:
    """Return F1 over classes, weighted by how often each is a target, and a target or a prediction, (R, C) both."""
    one_hot = np.eye(predictions.scores.shape[1])
    is_target, is_predicted = one_hot[targets_of(predictions)], one_hot[predictions.scores.argmax(axis=1)]  # (N, C)
    both = is_target * is_predicted

    def statistic(weights: Floats) -> Floats:
        hits, wanted, given = weights @ both, weights @ is_target, weights @ is_predicted
        seen = wanted + given
        shares = weigh(wanted, seen)
        result: Floats = (share(2 * hits, seen) * shares).sum(axis=1) / shares.sum(axis=1)
        return result

    return statistic


def area(predictions: ClassPredictions) -> Statistic:
    """Return the area under the ROC curve, 0 to 1, over weights (R, N); nan where a class is absent.

    For two classes it is that of the second, for more the plain mean over classes, each against the rest.
    """
    targets, scores = targets_of(predictions), predictions.scores
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    each = [rank_auc(targets == c, scores[:, c]) for c in classes]
    return lambda weights: np.mean([of_class(weights) for of_class in each], axis=0)


def rank_auc(positive: NDArray[np.bool_], scores: Floats) -> Statistic:
    """Return the statistic of the area under the ROC curve of one class against the rest, by ranks.

    The area is P(score of a positive > score of a negative) + P(tie)/2. The rows are sorted once; a draw then costs two
    sums over tied groups and one cumulative sum. Undefined (nan) where a draw has no positive or no negative row.

    Args:
        positive: (N,) True for rows of the class.
        scores: (N,) scores of the class.
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
        return share(wins, pairs, np.nan)

    return statistic


def kinds_of(predictions: ClassPredictions) -> tuple[ClassPredictions, Ints]:
    """Return the distinct (target, predicted) pairs and the number of rows of each, all that accuracy and F1 need.

    A thousand draws over a few cells of the confusion matrix have the same law as draws over the rows, and cost as
    little for a million rows as for a hundred.
    """
    scores: Floats = predictions.scores
    (targets, predicted), counts = kinds(targets_of(predictions), scores.argmax(axis=1))
    return ClassPredictions(None, np.eye(scores.shape[1])[predicted], targets.astype(np.int64)), counts
