"""F1 and average precision where rows have several labels. Point values are scikit-learn's.

Legend: R draws, n rows, L labels.
"""

from __future__ import annotations

import math

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Ints, Statistic
from graftwerk.tasks.predictions import LabelPredictions


def targets_of(predictions: LabelPredictions) -> Ints:
    """Return the labels (n, L) of rows that all have them, 0 or 1."""
    assert predictions.targets is not None  # `metrics.check` has refused rows without them
    return np.asarray(predictions.targets).astype(np.int64)


def f1_micro(predictions: LabelPredictions) -> float | None:
    """Return F1 over all pairs of a row and a label, 0 if no label is right or given."""
    return _over_all(f1_micro_statistic(predictions), predictions)


def f1_labels(predictions: LabelPredictions) -> float | None:
    """Return the mean over labels of the F1 of each; one that is never right nor given counts as 0."""
    return _over_all(f1_labels_statistic(predictions), predictions)


def average_precision(predictions: LabelPredictions) -> float | None:
    """Return the mean over labels of average precision; a label that no row has is left out. No threshold counts."""
    return _over_all(average_precision_statistic(predictions), predictions)


def _over_all(statistic: Statistic, predictions: LabelPredictions) -> float | None:
    value = float(statistic(np.ones((1, predictions.rows)))[0])
    return value if math.isfinite(value) else None


def f1_micro_statistic(predictions: LabelPredictions) -> Statistic:
    """Return micro F1 as a function of bootstrap weights (R, n)."""
    wanted, given = targets_of(predictions), predictions.given
    hits, seen = (wanted * given).sum(axis=1), (wanted + given).sum(axis=1)  # (n,)
    return lambda weights: _share(2 * (weights @ hits), weights @ seen)


def f1_labels_statistic(predictions: LabelPredictions) -> Statistic:
    """Return the mean F1 over labels as a function of bootstrap weights (R, n)."""
    wanted, given = targets_of(predictions), predictions.given
    hits, seen = (wanted * given).astype(np.float64), (wanted + given).astype(np.float64)  # (n, L)

    def statistic(weights: Floats) -> Floats:
        result: Floats = _share(2 * (weights @ hits), weights @ seen).mean(axis=1)
        return result

    return statistic


def average_precision_statistic(predictions: LabelPredictions) -> Statistic:
    """Return the mean average precision as a function of bootstrap weights (R, n); nan where no row has a label."""
    wanted = targets_of(predictions)
    each = [_precision_of(wanted[:, at], predictions.scores[:, at]) for at in range(wanted.shape[1])]

    def statistic(weights: Floats) -> Floats:
        values = np.stack([of_label(weights) for of_label in each], axis=1)  # (R, L)
        known = ~np.isnan(values)
        total, count = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
        result: Floats = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
        return result

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
        precision = _share(hits, np.cumsum(drawn, axis=1)[:, ends])
        gained = np.diff(hits, axis=1, prepend=0.0)
        result: Floats = np.divide(
            (gained * precision).sum(axis=1), hits[:, -1], out=np.full(len(hits), np.nan), where=hits[:, -1] > 0
        )
        return result

    return statistic


def _share(part: Floats, whole: Floats) -> Floats:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    result: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return result
