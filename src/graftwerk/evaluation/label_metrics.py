"""F1 and average precision where rows have several labels. All as functions of bootstrap weights.

Legend: R draws, n rows, L labels.
"""

from __future__ import annotations

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Ints, Statistic, share
from graftwerk.tasks.predictions import LabelPredictions


def targets_of(predictions: LabelPredictions) -> Ints:
    """Return the labels (n, L) of rows that all have them, 0 or 1."""
    assert predictions.targets is not None  # `metrics.check` has refused rows without them
    return np.asarray(predictions.targets).astype(np.int64)


def f1_micro(predictions: LabelPredictions) -> Statistic:
    """Return F1 over all pairs of a row and a label, 0 if no label is right or given, over weights (R, n)."""
    wanted, given = targets_of(predictions), predictions.given
    hits, seen = (wanted * given).sum(axis=1), (wanted + given).sum(axis=1)  # (n,)
    return lambda weights: share(2 * (weights @ hits), weights @ seen)


def f1_labels(predictions: LabelPredictions) -> Statistic:
    """Return the mean over labels of F1 over weights (R, n); a label that is never right nor given counts as 0."""
    wanted, given = targets_of(predictions), predictions.given
    hits, seen = (wanted * given).astype(np.float64), (wanted + given).astype(np.float64)  # (n, L)

    def statistic(weights: Floats) -> Floats:
        result: Floats = share(2 * (weights @ hits), weights @ seen).mean(axis=1)
        return result

    return statistic


def average_precision(predictions: LabelPredictions) -> Statistic:
    """Return the mean over labels of average precision over weights (R, n); no threshold counts.

    A label that no drawn row has is left out; nan where that is every label.
    """
    wanted = targets_of(predictions)
    each = [_precision_of(wanted[:, at], predictions.scores[:, at]) for at in range(wanted.shape[1])]

    def statistic(weights: Floats) -> Floats:
        values = np.stack([of_label(weights) for of_label in each], axis=1)  # (R, L)
        known = ~np.isnan(values)
        total, count = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
        return share(total, count, np.nan)

    return statistic


def _precision_of(wanted: Ints, scores: Floats) -> Statistic:
    """Return average precision of one label: precision at each score, weighted by the recall gained there."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], [True]]))
    right = wanted[order].astype(np.float64)  # (n,)

    def statistic(weights: Floats) -> Floats:
        drawn = weights[:, order]
        hits = np.cumsum(drawn * right, axis=1)[:, ends]  # (R, distinct scores)
        precision = share(hits, np.cumsum(drawn, axis=1)[:, ends])
        gained = np.diff(hits, axis=1, prepend=0.0)
        return share((gained * precision).sum(axis=1), hits[:, -1], np.nan)

    return statistic
