"""How good predictions are, each figure with the interval that its rows allow.

Point values come from scikit-learn. Intervals are percentile bootstrap intervals over rows (`bootstrap.py`): they say
how far the figure would move with other held-out rows of the same kind, not how far it would move with another
training seed; `paired.py` has both. What cannot be computed is None with a note that says why; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np

from graftwerk.errors import DataError, ModelError
from graftwerk.evaluate.bootstrap import (
    Floats,
    Ints,
    Statistic,
    accuracy,
    f1,
    kinds,
    percentile_interval,
    resample,
    roc_auc,
)
from graftwerk.tasks.base import Predictions

METRICS = ("accuracy", "f1_macro", "f1_weighted", "roc_auc")
FEW_DRAWS = 0.5
"""An interval stands on at least this share of the draws; with fewer the rows cannot carry one."""


class Figure(TypedDict):
    """A metric with its interval; ``note`` where something about it needs saying."""

    value: float | None
    low: float | None
    high: float | None
    note: NotRequired[str]


def metrics_of(
    predictions: Predictions,
    labels: Sequence[str] | None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Accuracy, F1 (macro, weighted) and ROC-AUC of classifications, each with a percentile bootstrap interval over
    rows.

    ROC-AUC of two classes is that of the second; of more, the mean over classes of each against the rest. It is None
    where the rows lack a class.

    Args:
        predictions: ``scores`` (n, C) that sum to one, ``targets`` (n,) class ids.
        labels: Names of the C classes for the notes, or None.
        confidence: Level of the intervals.
        resamples: Bootstrap draws.
        seed: Of the draws; the same seed and rows give the same draws for every model.
    Raises:
        DataError: no rows, or rows without targets.
        ModelError: scores that are not finite, or not one a class.
    """
    targets, scores = checked(predictions, labels)
    names = list(labels) if labels is not None else [str(c) for c in range(scores.shape[1])]
    predicted = scores.argmax(axis=1)
    (seen, given), counts = kinds(targets, predicted)
    classes = len(names)
    rng = np.random.default_rng(seed)
    of_cells = resample(
        counts,
        [accuracy(seen, given), f1(seen, given, classes, "macro"), f1(seen, given, classes, "weighted")],
        resamples,
        rng,
    )
    figures = {
        name: _figure(point(name, targets, scores) or 0.0, draws, confidence)
        for name, draws in zip(("accuracy", "f1_macro", "f1_weighted"), of_cells, strict=True)
    }
    if (accurate := figures["accuracy"]["value"]) in (0.0, 1.0):
        figures["accuracy"] = _certain(accurate, len(targets), confidence)
    figures["roc_auc"] = _roc_auc_figure(targets, scores, names, confidence, resamples, rng)
    return figures


def checked(predictions: Predictions, labels: Sequence[str] | None = None) -> tuple[Ints, Floats]:
    """Targets (n,) and scores (n, C), after what would make every figure meaningless has been refused."""
    if predictions.targets is None:
        raise DataError(
            "the rows have no labels, so nothing can be measured on them", mend="give rows with a label column"
        )
    targets = np.asarray(predictions.targets).astype(np.int64)
    scores = np.asarray(predictions.scores, dtype=np.float64)
    if len(targets) == 0:
        raise DataError("there are no rows to measure on", mend="hold out rows with data.validation or data.test")
    if scores.ndim != 2 or len(scores) != len(targets) or (labels is not None and scores.shape[1] != len(labels)):
        raise ModelError(
            f"scores of shape {scores.shape} do not fit {len(targets)} rows"
            + (f" and {len(labels)} labels" if labels is not None else "")
        )
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).any(axis=1).sum())
        raise ModelError(
            f"the model's scores are not finite on {bad} of {len(scores)} rows",
            mend="the run has diverged; train again",
        )
    return targets, scores


def point(metric: str, targets: Ints, scores: Floats) -> float | None:
    """One metric's value by scikit-learn; None where it is undefined."""
    from sklearn.metrics import accuracy_score, f1_score

    if metric == "roc_auc":
        return _roc_auc_point(targets, scores)
    predicted = scores.argmax(axis=1)
    if metric == "accuracy":
        return float(accuracy_score(targets, predicted))
    return float(f1_score(targets, predicted, average=metric.removeprefix("f1_"), zero_division=0))


def statistic_of(metric: str, targets: Ints, scores: Floats) -> Statistic:
    """The same metric as a function of row weights (R, n)."""
    classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
    if metric == "accuracy":
        return accuracy(targets, predicted)
    if metric == "f1_macro":
        return f1(targets, predicted, classes, "macro")
    if metric == "f1_weighted":
        return f1(targets, predicted, classes, "weighted")
    if metric == "roc_auc":
        return roc_auc(targets, scores)
    raise ModelError(f"there is no metric `{metric}`", mend=f"there are: {', '.join(METRICS)}")


def _roc_auc_point(targets: Ints, scores: Floats) -> float | None:
    from sklearn.metrics import roc_auc_score

    classes = scores.shape[1]
    if len(np.unique(targets)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(targets == 1, scores[:, 1]))
    return float(np.mean([roc_auc_score(targets == c, scores[:, c]) for c in range(classes)]))


def _roc_auc_figure(
    targets: Ints, scores: Floats, names: list[str], confidence: float, resamples: int, rng: np.random.Generator
) -> Figure:
    value = _roc_auc_point(targets, scores)
    if value is None:
        absent = [names[c] for c in range(scores.shape[1]) if not (targets == c).any()]
        shown = ", ".join(f"`{name}`" for name in absent[:5]) + (
            f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        )
        return {"value": None, "low": None, "high": None, "note": f"undefined: no row has the label {shown}"}
    draws = resample(np.ones(len(targets), dtype=np.int64), [roc_auc(targets, scores)], resamples, rng)[0]
    return _figure(value, draws, confidence)


def _figure(value: float, draws: Floats, confidence: float) -> Figure:
    undefined = int(np.isnan(draws).sum())
    if undefined > (1 - FEW_DRAWS) * len(draws):
        note = f"no interval: {undefined} of {len(draws)} draws lack a class; a class has too few rows"
        return {"value": value, "low": None, "high": None, "note": note}
    low, high = percentile_interval(draws, confidence)
    figure: Figure = {"value": value, "low": low, "high": high}
    if undefined:
        figure["note"] = f"{undefined} of {len(draws)} draws lacked a class and are left out of the interval"
    elif low == high and math.isclose(low, value):
        figure["note"] = "every draw of these rows gives the same value: the interval shows no spread, not certainty"
    return figure


def _certain(value: float, n: int, confidence: float) -> Figure:
    """All rows right or all wrong: every draw is alike, so the bootstrap has no width; the exact binomial bound has.

    With no failure in n rows the one-sided bound p solves p^n = 1 - confidence (Clopper and Pearson, 1934).
    """
    bound = float((1 - confidence) ** (1 / n))
    note = "all rows alike, so resampling shows no spread; the bound is the exact binomial one"
    if value == 1.0:
        return {"value": 1.0, "low": bound, "high": 1.0, "note": note}
    return {"value": 0.0, "low": 0.0, "high": 1 - bound, "note": note}
