"""Accuracy, F1 and ROC-AUC of classifications. Point values come from scikit-learn; what is undefined is None."""

from __future__ import annotations

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Ints, Statistic, roc_auc
from graftwerk.evaluation.bootstrap import accuracy as accuracy_over
from graftwerk.evaluation.bootstrap import f1 as f1_over
from graftwerk.tasks.predictions import ClassPredictions


def targets_of(predictions: ClassPredictions) -> Ints:
    """Return the class ids (N,) of rows that all have one."""
    assert predictions.targets is not None  # `metrics.check` has refused rows without them
    return np.asarray(predictions.targets).astype(np.int64)


def accuracy(predictions: ClassPredictions) -> float:
    """Return the share of rows whose class is predicted, 0 to 1."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(targets_of(predictions), predictions.scores.argmax(axis=1)))


def f1_macro(predictions: ClassPredictions) -> float:
    """Return the mean F1 over classes."""
    return _f1(predictions, "macro")


def f1_weighted(predictions: ClassPredictions) -> float:
    """Return the mean over rows of the F1 of their class."""
    return _f1(predictions, "weighted")


def _f1(predictions: ClassPredictions, average: str) -> float:
    from sklearn.metrics import f1_score

    predicted = predictions.scores.argmax(axis=1)
    return float(f1_score(targets_of(predictions), predicted, average=average, zero_division=0))


def area(predictions: ClassPredictions) -> float | None:
    """Return ROC-AUC: of the second class if there are two, else the mean over classes of each against the rest.

    Returns:
        The area, 0 to 1, or None if no row is of some class.
    """
    from sklearn.metrics import roc_auc_score

    targets, scores = targets_of(predictions), predictions.scores
    classes = scores.shape[1]
    if len(np.unique(targets)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(targets == 1, scores[:, 1]))
    return float(np.mean([roc_auc_score(targets == c, scores[:, c]) for c in range(classes)]))


def accuracy_statistic(predictions: ClassPredictions) -> Statistic:
    """Return accuracy as a function of bootstrap weights (R, N)."""
    return accuracy_over(targets_of(predictions), predictions.scores.argmax(axis=1))


def f1_macro_statistic(predictions: ClassPredictions) -> Statistic:
    """Return the mean F1 over classes as a function of bootstrap weights (R, N)."""
    scores = predictions.scores
    return f1_over(targets_of(predictions), scores.argmax(axis=1), scores.shape[1], "macro")


def f1_weighted_statistic(predictions: ClassPredictions) -> Statistic:
    """Return the mean F1 over rows as a function of bootstrap weights (R, N)."""
    scores = predictions.scores
    return f1_over(targets_of(predictions), scores.argmax(axis=1), scores.shape[1], "weighted")


def area_statistic(predictions: ClassPredictions) -> Statistic:
    """Return ROC-AUC as a function of bootstrap weights (R, N)."""
    return roc_auc(targets_of(predictions), predictions.scores)


def kinds_of(predictions: ClassPredictions) -> tuple[ClassPredictions, Ints]:
    """Return the distinct (target, predicted) pairs and the number of rows of each, all that accuracy and F1 need.

    A thousand draws over a few cells of the confusion matrix have the same law as draws over the rows, and cost as
    little for a million rows as for a hundred.
    """
    from graftwerk.evaluation.bootstrap import kinds

    scores: Floats = predictions.scores
    (targets, predicted), counts = kinds(targets_of(predictions), scores.argmax(axis=1))
    return ClassPredictions(None, np.eye(scores.shape[1])[predicted], targets.astype(np.int64)), counts
