"""Summarise the predictions of a split: confusions, metrics of each label, calibration, residuals, worst rows.

Everything is plain JSON, drawn by the report without any of this. Legend: n rows, C classes, L labels, K kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftwerk.evaluation.results_io import ROWS
from graftwerk.evaluation.row_results import ANALYSIS, Judged, named
from graftwerk.evaluation.tag_metrics import counts_by_kind
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.tasks.predictions import ClassPredictions, Floats, LabelPredictions, Predictions, ScorePredictions
from graftwerk.tasks.spans import OUTSIDE
from graftwerk.tasks.tag_predictions import TagPredictions

FORMAT = 1
MOST_CELLS = 12
"""With more classes than this the most frequent confusions stand in place of the whole matrix."""
MOST_PAIRS, MOST_LABELS, MOST_POINTS, MOST_WORST = 30, 200, 400, 20
BINS, SLICES = 10, 4
CUT = 300
"""Characters of a text of the worst rows."""
NORMAL_95 = 1.959964
LIKELIEST = 3


def analysis_of(
    predictions: Predictions,
    labels: Sequence[str],
    judged: Judged,
    records: Sequence[Mapping[str, Any]],
    lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the analysis of a split.

    Args:
        predictions: Predictions with targets.
        labels: Names of the classes in the order of their ids, or empty.
        judged: Their judgement.
        records: Their rows.
        lengths: Tokens of each row, or empty if a row is several inputs.
    """
    found: dict[str, Any] = {"rows": predictions.rows, "error": judged.error_name}
    if judged.wrong is not None:
        found["wrong"] = int(judged.wrong.sum())
    if isinstance(predictions, ClassPredictions):
        found |= _of_classes(predictions, labels)
    elif isinstance(predictions, LabelPredictions):
        found |= _of_labels(predictions, labels)
    elif isinstance(predictions, TagPredictions):
        found |= _of_tags(predictions)
    elif isinstance(predictions, ScorePredictions):
        found["residuals"] = residuals_of(predictions)
    if len(lengths) == predictions.rows > SLICES:
        found["by_length"] = by_length(judged, np.asarray(lengths))
    order = np.argsort(-judged.error, kind="stable")
    if judged.wrong is not None:
        order = order[judged.wrong[order]]
    found["worst"] = [_short(records[at]) for at in order[:MOST_WORST]]
    return found


def write_analysis(folder: Path, splits: Mapping[str, Any]) -> None:
    """Write the analyses of all splits into a run folder.

    Raises:
        ResourceError: It cannot be written.
        ConfigError: Labels or texts are too long for the file.
    """
    path = folder / ROWS / ANALYSIS
    content = redacted({"format": FORMAT, "splits": splits})
    write_file(path, dump_object(content, path, seal=True), own=True)


def _of_classes(predictions: ClassPredictions, labels: Sequence[str]) -> dict[str, Any]:
    assert predictions.targets is not None
    scores, targets = predictions.scores, np.asarray(predictions.targets).astype(np.int64)
    classes, chosen = scores.shape[1], scores.argmax(axis=1)
    names = named(labels, classes)
    cells = np.bincount(targets * classes + chosen, minlength=classes**2).reshape(classes, classes)  # (true, predicted)
    found: dict[str, Any] = {
        "by_label": by_label(names, np.diag(cells), cells.sum(axis=0), cells.sum(axis=1)),
        "calibration": calibration(scores.max(axis=1), chosen == targets),
    }
    if classes <= MOST_CELLS:
        return {"confusion": {"labels": names, "counts": cells.tolist()}, **found}
    wrong = cells - np.diag(np.diag(cells))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [(int(at) // classes, int(at) % classes) for at in order if wrong.flat[at]]
    confusions = [{"true": names[a], "predicted": names[b], "rows": int(wrong[a, b])} for a, b in pairs]
    return {"confusions": confusions, "confused_pairs": int((wrong > 0).sum()), **found}


def _of_labels(predictions: LabelPredictions, labels: Sequence[str]) -> dict[str, Any]:
    targets, given = np.asarray(predictions.targets).astype(np.int64), predictions.given
    names = named(labels, targets.shape[1])
    rows = by_label(names, (targets * given).sum(axis=0), given.sum(axis=0), targets.sum(axis=0))
    thresholds = dict(zip(names, predictions.thresholds.tolist(), strict=True))
    return {
        "by_label": [{**row, "threshold": thresholds[row["label"]]} for row in rows],
        "calibration": calibration(predictions.scores.ravel(), targets.ravel() > 0),
    }


def _of_tags(predictions: TagPredictions) -> dict[str, Any]:
    kinds, (right, found, there) = counts_by_kind(predictions)
    certain = np.array([score for row in predictions.certainties for score in row])
    pairs = zip(predictions.tag_names, predictions.target_names, strict=True)
    same = np.array([tag == target for tags, targets in pairs for tag, target in zip(tags, targets, strict=True)])
    counts = [each.sum(axis=0).astype(np.int64) for each in (right, found, there)]
    entities = [at for at, kind in enumerate(kinds) if kind not in ("", OUTSIDE)]
    return {
        "by_label": by_label([kinds[at] for at in entities], *(each[entities] for each in counts)),
        "calibration": calibration(certain, same),
    }


def by_label(
    names: Sequence[str], right: NDArray[np.int64], found: NDArray[np.int64], there: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each label, the most frequent first; what is undefined is None.

    Args:
        names: Names of the K labels.
        right: (K,) how often it was given rightly.
        found: (K,) how often it was given.
        there: (K,) how often it is right.
    """
    order = np.argsort(-there, kind="stable")[:MOST_LABELS]
    return [
        {
            "label": names[at],
            "rows": int(there[at]),
            "predicted": int(found[at]),
            "right": int(right[at]),
            "precision": _share(right[at], found[at]),
            "recall": _share(right[at], there[at]),
            "f1": _share(2 * right[at], found[at] + there[at]),
        }
        for at in order
    ]


def by_length(judged: Judged, lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the errors of short and long rows: quarters of the rows by length, fewer if many have the same one.

    Args:
        judged: Judgement of the n rows.
        lengths: (n,) tokens of each.

    Returns:
        For each slice ``from`` and ``to`` (tokens), ``rows`` and the mean ``error``; and ``wrong`` with the share of
        right answers and its interval (Wilson's, at 95 %), if answers are right or wrong.
    """
    edges = np.unique(np.quantile(lengths, np.arange(1, SLICES) / SLICES, method="inverted_cdf"))
    of_slice = np.searchsorted(edges, lengths)
    slices = []
    for at in np.unique(of_slice):
        inside = of_slice == at
        count = int(inside.sum())
        found: dict[str, Any] = {
            "from": int(lengths[inside].min()), "to": int(lengths[inside].max()), "rows": count,
            "error": float(judged.error[inside].mean()),
        }  # fmt: skip
        if judged.wrong is not None:
            wrong = int(judged.wrong[inside].sum())
            low, high = _wilson(1 - wrong / count, count)
            found |= {"wrong": wrong, "right": 1 - wrong / count, "low": low, "high": high}
        slices.append(found)
    return slices


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def calibration(confidence: Floats, right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the reliability of probabilities in ten bins of equal width, and the expected calibration error.

    The error is the mean distance between a bin's confidence and its share of right answers, weighted by the bins'
    sizes (Guo et al. 2017, "On Calibration of Modern Neural Networks"). The intervals are Wilson's, at 95 %.

    Args:
        confidence: (K,) probability of each answer.
        right: (K,) True where it is right.
    """
    of_bin = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = []
    error = 0.0
    for at in range(BINS):
        inside = of_bin == at
        if not (count := int(inside.sum())):
            continue
        mean, share = float(confidence[inside].mean()), float(right[inside].mean())
        low, high = _wilson(share, count)
        bins.append({"rows": count, "confidence": mean, "right": share, "low": low, "high": high})
        error += abs(mean - share) * count / len(confidence)
    return {"answers": len(confidence), "bins": bins, "expected_calibration_error": error}


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return the score interval of a share (Wilson, 1927)."""
    z = NORMAL_95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def residuals_of(predictions: ScorePredictions) -> dict[str, Any]:
    """Return mean, spread and quantiles of predicted less true, and evenly spaced rows as (true, residual)."""
    targets = np.asarray(predictions.targets, dtype=np.float64)
    residuals = predictions.values - targets
    quantiles = np.quantile(residuals, [0.05, 0.25, 0.5, 0.75, 0.95])
    count = min(len(targets), MOST_POINTS)
    chosen = [at * len(targets) // count for at in range(count)]
    return {
        "mean": float(residuals.mean()),
        "deviation": float(residuals.std()),
        "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles.tolist(), strict=True)),
        "points": [[float(targets[at]), float(residuals[at])] for at in chosen],
    }


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its likeliest scores and the beginnings of its texts and lists."""
    short: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, str) and len(value) > CUT:
            short[name] = value[:CUT].rstrip() + "…"
        elif name == "scores":
            likeliest = sorted(value.items(), key=lambda item: -item[1])[:LIKELIEST]
            short[name] = {label: round(score, 4) for label, score in likeliest}
        else:
            short[name] = value[:MOST_WORST] if isinstance(value, list) else value
    return short
