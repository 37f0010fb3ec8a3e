"""The predictions of a run's held-out rows, one JSON object a line, and what they say together (`analysis.py`).

Legend: n rows, C classes, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftwerk.evaluation.evaluate import shown_input
from graftwerk.evaluation.results_io import ROWS
from graftwerk.sanitize import dump_json, redact
from graftwerk.serialization.atomic import write_file
from graftwerk.tasks.base import Example, Row, Task
from graftwerk.tasks.predictions import (
    ClassPredictions,
    Floats,
    LabelPredictions,
    Predictions,
    ScorePredictions,
    TextPredictions,
)
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

ANALYSIS = "analysis.json"
"""In the folder `ROWS` of a run."""
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Judged:
    """The rows of a split beside their right answers.

    Attributes:
        error_name: What `error` counts.
        error: (n,), larger is worse.
        true: The right answer of each row, or None if there is none but a rank or a likelihood.
        predicted: The answer of each row, or None if the model gives none.
        wrong: (n,), or None if answers are not right or wrong.
        confidence: The probability of the answer of a row, or of the worst mistake in it, or None if it has none.
        more: Further values of each row.
    """

    error_name: str
    error: Floats
    true: Sequence[Any] | None = None
    predicted: Sequence[Any] | None = None
    wrong: NDArray[np.bool_] | None = None
    confidence: Sequence[float | None] | None = None
    more: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def values(self) -> dict[str, Sequence[Any]]:
        """Return what is said of the rows, by name."""
        named: dict[str, Sequence[Any] | None] = {
            "true": self.true,
            "predicted": self.predicted,
            "wrong": None if self.wrong is None else self.wrong.tolist(),
            "error": self.error.tolist(),
            "confidence": self.confidence,
            **self.more,
        }
        return {name: values for name, values in named.items() if values is not None}


def records_of(
    task: Task,
    predictions: Predictions,
    examples: Sequence[Example],
    rows: Sequence[Row],
    labels: Sequence[str],
    where: Callable[[int], str] | None = None,
) -> tuple[Judged, list[dict[str, Any]]]:
    """Return the predictions of a split row by row.

    Args:
        task: The task.
        predictions: Predictions with targets.
        examples: The encoded rows.
        rows: The rows.
        labels: Names of the classes in the order of their ids, or empty.
        where: Function from a row's index to its place (`file:line`).

    Returns:
        The judgement, and for each row its number in the split, its place, its texts, and the values of the judgement.
    """
    judged = judge(task, predictions, rows, labels)
    values = judged.values()
    whole = len(rows) == predictions.rows  # else a row is a piece of a text
    records = []
    for at in range(predictions.rows):
        record: dict[str, Any] = {"row": at + 1}
        if where is not None and whole:
            record["where"] = redact(where(at))
        row = rows[at] if whole else examples[at].row or {}
        record |= shown_input(task, row, examples[at if len(examples) == predictions.rows else 0])
        if "tokens" in row and "text" not in row:
            record["text"] = " ".join(row["tokens"])
        records.append({**record, **{name: each[at] for name, each in values.items()}})
    return judged, records


def write_records(folder: Path, split: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the records of a split into a run folder.

    Raises:
        ResourceError: It cannot be written.
    """
    content = "".join(dump_json(record) + "\n" for record in records)
    return write_file(folder / ROWS / f"{split}.jsonl", content, own=True)


def judge(task: Task, predictions: Predictions, rows: Sequence[Row], labels: Sequence[str]) -> Judged:
    """Return predictions beside the right answers.

    Args:
        task: The task, which names the entities of a row.
        predictions: Predictions with targets.
        rows: The rows.
        labels: Names of the classes in the order of their ids, or empty.
    """
    if isinstance(predictions, ClassPredictions):
        return _classes(predictions, labels)
    if isinstance(predictions, LabelPredictions):
        return _labels(predictions, labels)
    if isinstance(predictions, ScorePredictions):
        assert predictions.targets is not None
        apart = predictions.values - predictions.targets
        more = {"residual": apart.tolist()}
        return Judged(
            "absolute error", np.abs(apart), predictions.targets.tolist(), predictions.values.tolist(), more=more
        )
    if isinstance(predictions, TagPredictions):
        return _tags(task, predictions, rows)
    if isinstance(predictions, SimilarityPredictions):
        return _pairs(predictions)
    assert isinstance(predictions, TextPredictions)
    wrong = None
    if predictions.texts is not None and predictions.references is not None:
        pairs = zip(predictions.texts, predictions.references, strict=True)
        wrong = np.array([one.split() != other.split() for one, other in pairs], dtype=bool)  # as `exact_match` does
    nats = predictions.nll / np.maximum(predictions.tokens, 1)
    return Judged("nats a token", nats, predictions.references, predictions.texts, wrong)


def _classes(predictions: ClassPredictions, labels: Sequence[str]) -> Judged:
    assert predictions.targets is not None
    scores, targets = predictions.scores, np.asarray(predictions.targets)
    names, chosen = named(labels, scores.shape[1]), scores.argmax(axis=1)
    return Judged(
        "nats",
        -np.log(np.maximum(scores[np.arange(len(scores)), targets], TINY)),
        [names[label] for label in targets],
        [names[label] for label in chosen],
        chosen != targets,
        scores.max(axis=1).tolist(),
        {"scores": _by_name(scores, names)},
    )


def _labels(predictions: LabelPredictions, labels: Sequence[str]) -> Judged:
    assert predictions.targets is not None
    scores, targets, given = predictions.scores, np.asarray(predictions.targets) > 0, predictions.given
    names = named(labels, scores.shape[1])
    right = np.where(targets, scores, 1 - scores)  # (n, L)
    missed = np.where(given != targets, np.where(given, scores, 1 - scores), -1.0).max(axis=1)  # (n,)
    return Judged(
        "nats a label",
        -np.log(np.maximum(right, TINY)).mean(axis=1),
        [[name for name, has in zip(names, row, strict=True) if has] for row in targets],
        [[name for name, has in zip(names, row, strict=True) if has] for row in given],
        (given != targets).any(axis=1),
        [float(value) if value >= 0 else None for value in missed],
        {"scores": _by_name(scores, names)},
    )


def _tags(task: Task, predictions: TagPredictions, rows: Sequence[Row]) -> Judged:
    true, predicted, errors, confidence = [], [], [], []
    for row, tags, targets, scores in zip(
        rows, predictions.tag_names, predictions.target_names, predictions.certainties, strict=True
    ):
        there = task.completed({"tags": list(targets), "scores": [1.0] * len(targets)}, row)["entities"]
        found = task.completed({"tags": list(tags), "scores": scores}, row)["entities"]
        true.append([{name: value for name, value in entity.items() if name != "score"} for entity in there])
        predicted.append(found)
        errors.append(len(_spans(there) ^ _spans(found)))
        bad = [score for tag, target, score in zip(tags, targets, scores, strict=True) if tag != target]
        confidence.append(max(bad, default=None))
    counted = np.array(errors, dtype=np.float64)
    return Judged("entities missed or too many", counted, true, predicted, counted > 0, confidence)


def _spans(entities: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {(entity["start"], entity["end"], entity["label"]) for entity in entities}


def _pairs(predictions: SimilarityPredictions) -> Judged:
    similarity = predictions.values.tolist()
    if predictions.targets is None:
        ranks = predictions.ranks
        return Judged("rank", ranks.astype(np.float64), None, similarity, ranks > 1, more={"rank": ranks.tolist()})
    from scipy.stats import rankdata

    places = [rankdata(values) / predictions.rows for values in (predictions.values, predictions.targets)]
    return Judged("difference of ranks", np.abs(places[0] - places[1]), predictions.targets.tolist(), similarity)


def named(labels: Sequence[str], number: int) -> list[str]:
    """Return the names of the classes, or their ids if they have no names."""
    return list(labels) or [str(label) for label in range(number)]


def _by_name(scores: Floats, names: Sequence[str]) -> list[dict[str, float]]:
    return [dict(zip(names, row, strict=True)) for row in scores.tolist()]
