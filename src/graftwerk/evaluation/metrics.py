"""Registry of metrics, and their values with intervals.

Intervals are percentile bootstrap intervals over rows (`row_interval.py`): they say how far a value would move with
other held-out rows of the same kind, not with another training seed; `paired_bootstrap.py` has both. A value that
cannot be computed is None, with a note that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from graftwerk.errors import DataError, ModelError, ResourceError
from graftwerk.evaluation import class_metrics, label_metrics, score_metrics, tag_metrics, text_metrics
from graftwerk.evaluation.bootstrap import Ints, Statistic, resample
from graftwerk.evaluation.metric import Metric, names_in, over_sets
from graftwerk.evaluation.row_interval import MetricValue, interval_over_rows
from graftwerk.tasks.predictions import (
    ClassPredictions,
    LabelPredictions,
    Predictions,
    ScorePredictions,
    TextPredictions,
)
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions


def _of_classes(predictions: Predictions) -> bool:
    return isinstance(predictions, ClassPredictions)


def _of_scores(predictions: Predictions) -> bool:
    of_pairs = isinstance(predictions, SimilarityPredictions) and predictions.targets is not None
    return of_pairs or isinstance(predictions, ScorePredictions)


def _of_ranks(predictions: Predictions) -> bool:
    return isinstance(predictions, SimilarityPredictions) and predictions.targets is None


def _of_labels(predictions: Predictions) -> bool:
    return isinstance(predictions, LabelPredictions)


def _of_tags(predictions: Predictions) -> bool:
    return isinstance(predictions, TagPredictions)


def _of_likelihoods(predictions: Predictions) -> bool:
    return isinstance(predictions, TextPredictions) and bool(predictions.tokens.sum())


def _of_texts(predictions: Predictions) -> bool:
    return (
        isinstance(predictions, TextPredictions)
        and predictions.texts is not None
        and predictions.references is not None
    )


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "share", True, class_metrics.accuracy, _of_classes, cells=True),
    "f1_macro": Metric("macro F1", "share", True, class_metrics.f1_macro, _of_classes, cells=True, by_class=True),
    "f1_weighted": Metric("weighted F1", "share", True, class_metrics.f1_weighted, _of_classes, cells=True),
    "roc_auc": Metric("ROC-AUC", "share", True, class_metrics.area, _of_classes, by_class=True),
    "exact_match": Metric("exact match", "share", True, text_metrics.exact_match, _of_texts),
    "rouge1": Metric(
        "ROUGE-1", "share", True, text_metrics.rouge1, _of_texts, text_metrics.rouge_signature, package="rouge-score"
    ),
    "rouge2": Metric(
        "ROUGE-2", "share", True, text_metrics.rouge2, _of_texts, text_metrics.rouge_signature, package="rouge-score"
    ),
    "rougeL": Metric(
        "ROUGE-L", "share", True, text_metrics.rouge_l, _of_texts, text_metrics.rouge_signature, package="rouge-score"
    ),
    "rougeL_stemmed": Metric(
        "ROUGE-L, stemmed",
        "share",
        True,
        text_metrics.rouge_l_stemmed,
        _of_texts,
        text_metrics.rouge_stemmed_signature,
        package="rouge-score",
    ),
    "bleu": Metric(
        "BLEU",
        "points",
        True,
        text_metrics.bleu,
        _of_texts,
        text_metrics.bleu_signature,
        package="sacrebleu",
        caution=text_metrics.bleu_caution,
    ),
    "chrf": Metric(
        "chrF", "points", True, text_metrics.chrf, _of_texts, text_metrics.chrf_signature, package="sacrebleu"
    ),
    "perplexity": Metric("perplexity", "nats", False, text_metrics.perplexity, _of_likelihoods),
    "length": Metric("words an answer", "tokens", None, text_metrics.length, _of_texts),
    "pearson": Metric("Pearson", "correlation", True, score_metrics.pearson, _of_scores),
    "spearman": Metric("Spearman", "correlation", True, score_metrics.spearman, _of_scores),
    "rmse": Metric("RMSE", "score", False, score_metrics.rmse, _of_scores),
    "mae": Metric("MAE", "score", False, score_metrics.mae, _of_scores),
    "f1_micro": Metric("micro F1", "share", True, label_metrics.f1_micro, _of_labels),
    "f1_labels": Metric("macro F1 over labels", "share", True, label_metrics.f1_labels, _of_labels),
    "average_precision": Metric("average precision", "share", True, label_metrics.average_precision, _of_labels),
    "entity_f1": Metric("entity F1", "share", True, tag_metrics.entity_f1, _of_tags),
    "entity_precision": Metric("entity precision", "share", True, tag_metrics.precision, _of_tags),
    "entity_recall": Metric("entity recall", "share", True, tag_metrics.recall, _of_tags),
    "entity_f1_macro": Metric("macro entity F1", "share", True, tag_metrics.macro_f1, _of_tags),
    "word_accuracy": Metric("word accuracy", "share", True, tag_metrics.word_accuracy, _of_tags),
    "recall_at_1": Metric("recall at 1", "share", True, score_metrics.recall(1), _of_ranks),
    "recall_at_10": Metric("recall at 10", "share", True, score_metrics.recall(10), _of_ranks),
    "reciprocal_rank": Metric("mean reciprocal rank", "share", True, score_metrics.reciprocal_rank, _of_ranks),
}
METRICS.update({name: over_sets(metric) for name, metric in METRICS.items()})


def packages_of(names: Sequence[str]) -> list[str]:
    """Return the optional packages that these metrics need, by the names that pip knows."""
    return list(dict.fromkeys(package for name in names if (package := METRICS[name].package) is not None))


def require_packages(names: Sequence[str]) -> None:
    """Check, before training begins, that the packages of these metrics are installed.

    Raises:
        ResourceError: A package that one of these metrics needs is not installed.
    """
    for package in packages_of(names):
        if find_spec(package.replace("-", "_")) is None:
            needing = [METRICS[name].title for name in names if METRICS[name].package == package]
            raise ResourceError(
                f"{', '.join(needing)} need{'s' if len(needing) == 1 else ''} the package {package}",
                hint="pip install 'graftwerk[text]'; or evaluation.generate=false, which leaves answers unmeasured",
            )


def metrics_of(
    predictions: Predictions,
    labels: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, MetricValue]:
    """Return the metrics that are defined on these predictions, each with a bootstrap interval over rows.

    Args:
        predictions: Predictions with targets.
        labels: Names of the classes, for notes.
        names: Names of metrics, or None for all that are defined.
        confidence: Level of the intervals, 0 to 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples; the same seed and rows give the same resamples for every model.

    Returns:
        By metric ``value``, ``low`` and ``high``, and ``note`` or ``signature`` if there is one.

    Raises:
        DataError: There are no rows, or rows without targets.
        ModelError: Scores are not finite, or not one per class.
    """
    check(predictions, labels)
    rng = np.random.default_rng(seed)
    figures: dict[str, MetricValue] = {}
    for cells in (True, False):  # metrics of one kind share their draws
        chosen = [
            name
            for name, metric in METRICS.items()
            if metric.cells is cells and metric.defined(predictions) and (names is None or name in names)
        ]
        drawable = {name: value for name in chosen if (value := METRICS[name].value(predictions)) is not None}
        for name in chosen:
            if name not in drawable:
                figures[name] = {"value": None, "low": None, "high": None, "note": _undefined(predictions, labels)}
        if not drawable:
            continue
        if cells:
            assert isinstance(predictions, ClassPredictions)
            drawn_from, counts = class_metrics.kinds_of(predictions)
        else:
            drawn_from, counts = predictions, np.ones(predictions.rows, dtype=np.int64)  # type: ignore[assignment]
        draws = resample(counts, [METRICS[name].statistic(drawn_from) for name in drawable], resamples, rng)
        for (name, value), drawn in zip(drawable.items(), draws, strict=True):
            bounds, effect = METRICS[name].bounds, row_effect(name, predictions)
            figures[name] = interval_over_rows(value, drawn, confidence, bounds, effect)
            if (signature := METRICS[name].signature) is not None:
                figures[name]["signature"] = signature(predictions)
            if (caution := METRICS[name].caution(predictions)) is not None:
                figures[name]["note"] = "; ".join(filter(None, [figures[name].get("note"), caution]))
    order = list(METRICS) if names is None else list(names)
    return {name: figures[name] for name in order if name in figures}


def check(predictions: Predictions, labels: Sequence[str] | None = None) -> None:
    """Check that metrics can be computed from predictions.

    Raises:
        DataError: There are no rows, or rows without targets.
        ModelError: Scores are not finite, or not one per class.
    """
    if predictions.rows == 0:
        raise DataError("there are no rows to measure on", hint="hold out rows with data.validation or data.test")
    if not predictions.measurable:
        raise DataError(
            "the rows have no labels, so nothing can be measured on them", hint="give rows with a label column"
        )
    if isinstance(predictions, ClassPredictions):
        assert predictions.targets is not None
        shape, rows = predictions.scores.shape, len(predictions.targets)
        if len(shape) != 2 or shape[0] != rows or (labels is not None and shape[1] != len(labels)):
            raise ModelError(
                f"scores of shape {shape} do not fit {rows} rows"
                + (f" and {len(labels)} labels" if labels is not None else "")
            )
    if bad := predictions.bad_rows:
        raise ModelError(
            f"the model's scores are not finite on {bad} of {predictions.rows} rows",
            hint="the run has diverged; train again",
        )


def point(metric: str, predictions: Predictions) -> float | None:
    """Return one metric's value, or None if it is undefined on these predictions."""
    return METRICS[metric].value(predictions) if METRICS[metric].defined(predictions) else None


def statistic_of(metric: str, predictions: Predictions) -> Statistic:
    """Return a metric as a function of row weights (R, n).

    Raises:
        ModelError: There is no such metric.
    """
    if metric not in METRICS:
        raise ModelError(f"there is no metric `{metric}`", hint=f"there are: {', '.join(METRICS)}")
    return METRICS[metric].statistic(predictions)


def _undefined(predictions: Predictions, labels: Sequence[str] | None) -> str:
    if not isinstance(predictions, ClassPredictions) or predictions.targets is None:
        return "undefined on these rows"
    classes = predictions.scores.shape[1]
    names = list(labels) if labels is not None else [str(c) for c in range(classes)]
    absent = [names[c] for c in range(classes) if not (predictions.targets == c).any()]
    shown = ", ".join(f"`{name}`" for name in absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    return f"undefined: no row has the label {shown}"


def row_effect(metric: str, predictions: Predictions) -> float:
    """Return what one wrong row changes in a metric if all others are right, on average; 0.0 without an upper bound.

    A share of n rows changes by 1/n. Where G groups (classes, data sets) count the same, a row of a group of n_g rows
    changes the mean over them by 1/(G n_g).
    """
    known = METRICS[metric]
    least, most = known.bounds
    if math.isinf(most) or known.unit == "correlation":
        return 0.0
    groups: Ints = np.array([predictions.rows], dtype=np.int64)
    if known.by_class and isinstance(predictions, ClassPredictions):
        groups = np.unique(class_metrics.targets_of(predictions), return_counts=True)[1]
    elif isinstance(predictions, TextPredictions) and predictions.sets:
        groups = np.unique(np.asarray(predictions.sets), return_counts=True)[1]
    return (most - least) * float((1 / groups).mean()) / len(groups)


def metrics_by_set(predictions: Predictions, **options: Any) -> dict[str, Any]:
    """Return `metrics_of` of each data set's rows, by its name; empty if there is one data set."""
    if not isinstance(predictions, TextPredictions):
        return {}
    return {name: metrics_of(predictions.of_set(name), **options) for name in names_in(predictions)}


def row_scores(predictions: Predictions) -> list[float] | None:
    """Return a score of each row, higher is better, or None for answers that have none.

    Classes: 1 for the right one, else 0. Numbers: minus the distance from the target. Texts: minus the nats of a token.

    Example:
        >>> row_scores(ClassPredictions(None, np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1])))
        [1.0, 0.0]
    """
    if isinstance(predictions, ClassPredictions) and predictions.targets is not None:
        scores = (predictions.scores.argmax(axis=1) == predictions.targets).astype(float)
    elif isinstance(predictions, ScorePredictions) and predictions.targets is not None:
        scores = -np.abs(predictions.values - predictions.targets)
    elif isinstance(predictions, TextPredictions):
        scores = -predictions.nll / np.maximum(predictions.tokens, 1)
    else:
        return None
    return [float(f"{score:.4g}") for score in scores]
