"""A model against a guess that reads nothing: the most frequent label, the mean, a random order.

The difference has an interval over the same bootstrap draws of rows for both. A run whose interval holds zero has not
been shown to have learnt anything, whatever its accuracy is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Ints, percentile_interval, resample
from graftwerk.evaluation.class_metrics import kinds_of, targets_of
from graftwerk.evaluation.metrics import METRICS, check
from graftwerk.evaluation.row_interval import enough_draws
from graftwerk.tasks.predictions import ClassPredictions, LabelPredictions, Predictions, ScorePredictions
from graftwerk.tasks.spans import OUTSIDE
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

HINT = (
    "more epochs, a higher training.learning_rate, or rows that tell more; `graftwerk errors` shows what it gets wrong"
)


@dataclass(frozen=True)
class Guess:
    """A guess that does not read the rows.

    Attributes:
        metric: The metric that it is compared in.
        what: It in words: ``always answering `a```.
        rows: What it answers, or None if only its expected value is known.
        value: Its value of the metric.
    """

    metric: str
    what: str
    rows: Predictions | None
    value: float


def against_chance(
    predictions: Predictions,
    labels: Sequence[str] | None,
    metrics: Mapping[str, Any],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Compare predictions with the best guess that does not read the rows.

    Args:
        predictions: Predictions with targets.
        labels: Names of the classes in the order of their ids, or None.
        metrics: `metrics_of` these predictions, which says if scores rank rows whose labels are no better than a guess.
        confidence: Level of the interval, 0 to 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        ``metric``, ``guess`` (in words), ``guess_value``, ``difference`` (``value``, ``low``, ``high``; positive if the
        model is better), ``at_chance``, and ``text`` and ``hint`` where the difference is not shown to be positive. Or
        None for tasks without such a guess, and for rows on which the guess is perfect.
    """
    check(predictions)
    guess = _guess(predictions, labels)
    if guess is None:
        return None
    known, counts = METRICS[guess.metric], np.ones(predictions.rows, dtype=np.int64)
    value = known.value(predictions)
    if value is None or (known.higher is not False and math.isclose(guess.value, known.bounds[1])):
        return None
    drawn_from, blind = predictions, guess.rows
    if isinstance(predictions, ClassPredictions) and isinstance(blind, ClassPredictions):
        drawn_from, counts = kinds_of(predictions)
        blind = _constant(drawn_from, int(blind.scores[0].argmax()))
    statistics = [known.statistic(one) for one in (drawn_from, blind) if one is not None]
    draws = resample(counts, statistics, resamples, np.random.default_rng(seed))  # (1 or 2, R)
    apart: Floats = draws[0] - (draws[1] if len(draws) > 1 else guess.value)
    apart = -apart if known.higher is False else apart
    if not enough_draws(int((~np.isnan(apart)).sum()), len(apart)):
        return None
    low, high = percentile_interval(apart, confidence)
    difference = {"value": known.better(value, guess.value), "low": low, "high": high}
    found: dict[str, Any] = {
        "metric": guess.metric,
        "guess": guess.what,
        "guess_value": guess.value,
        "difference": difference,
        "at_chance": low <= 0,
    }
    if low > 0:
        return found
    ending = " %" if known.unit == "share" else ""
    apart_by = [known.text(bound, signed=True) for bound in (difference["value"], low, high)]
    text = (
        f"{known.title} {known.text(value)}{ending} is not shown to be better than {guess.what} "
        f"({known.text(guess.value)}{ending}): {apart_by[0]}{known.words}, {100 * confidence:g} % interval "
        f"{apart_by[1]} to {apart_by[2]}"
    )
    area = metrics.get("roc_auc") or {}
    if (area.get("low") or 0.0) > 0.5:
        text += f"; but its scores rank rows better than chance (ROC-AUC {METRICS['roc_auc'].text(area['value'])} %)"
        return {**found, "at_chance": False, "text": text}
    return {**found, "text": text, "hint": HINT}


def _guess(predictions: Predictions, labels: Sequence[str] | None) -> Guess | None:
    """Return the best guess that is the same for every row, or None if there is none."""
    if isinstance(predictions, ClassPredictions):
        counts = np.bincount(targets_of(predictions), minlength=predictions.scores.shape[1])
        most = int(counts.argmax())
        name = labels[most] if labels else str(most)
        return _measured("accuracy", f"always answering `{name}`", _constant(predictions, most))
    if isinstance(predictions, ScorePredictions):
        assert predictions.targets is not None
        targets = np.asarray(predictions.targets, dtype=np.float64)
        if not targets.std() > 0:
            return None
        mean = ScorePredictions(None, np.full(len(targets), targets.mean()), predictions.targets)
        return _measured("rmse", "always answering the mean", mean)
    if isinstance(predictions, LabelPredictions):
        return _labels_always(predictions, labels)
    if isinstance(predictions, TagPredictions):
        outside = predictions.labels.index(OUTSIDE) if OUTSIDE in predictions.labels else None
        if outside is None or not any(tag != OUTSIDE for tags in predictions.target_names for tag in tags):
            return None
        return Guess("entity_f1", "finding nothing", None, 0.0)
    if isinstance(predictions, SimilarityPredictions):
        if predictions.targets is not None:
            return Guess("spearman", "a random order", None, 0.0)
        expected = float((1 / np.arange(1, predictions.rows + 1)).mean())
        return Guess("reciprocal_rank", "a random order", None, expected)
    return None


def _measured(metric: str, what: str, rows: Predictions) -> Guess:
    value = METRICS[metric].value(rows)
    return Guess(metric, what, rows, 0.0 if value is None else value)


def _constant(predictions: ClassPredictions, label: int) -> ClassPredictions:
    scores = np.zeros(predictions.scores.shape)
    scores[:, label] = 1.0
    return ClassPredictions(None, scores, predictions.targets)


def _labels_always(predictions: LabelPredictions, labels: Sequence[str] | None) -> Guess | None:
    """Return the set of most frequent labels that has the best micro F1 if every row gets it."""
    assert predictions.targets is not None
    counts: Ints = np.asarray(predictions.targets).sum(axis=0)
    if not counts.sum():
        return None
    order = np.argsort(-counts, kind="stable")
    given = np.arange(1, len(order) + 1) * predictions.rows
    size = int((2 * counts[order].cumsum() / (given + counts.sum())).argmax()) + 1
    scores = np.zeros(predictions.scores.shape)
    scores[:, order[:size]] = 1.0
    names = [labels[at] if labels else str(at) for at in order[:size]]
    said = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {size - 3} more" if size > 3 else "")
    return _measured(
        "f1_micro",
        f"always giving {said}",
        LabelPredictions(None, scores, predictions.targets, np.full(len(order), 0.5)),
    )
