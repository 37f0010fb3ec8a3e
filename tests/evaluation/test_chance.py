"""Predictions against a guess that does not read the rows, for each kind of answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graftwerk.evaluation.chance import against_chance
from graftwerk.evaluation.metrics import METRICS, metrics_of
from graftwerk.tasks.predictions import (
    ClassPredictions,
    LabelPredictions,
    Predictions,
    ScorePredictions,
    TextPredictions,
)
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

N = 200


def classes(skill: float, *, share: float = 0.6, seed: int = 0) -> ClassPredictions:
    """Two classes; `share` of the rows are of the second."""
    rng = np.random.default_rng(seed)
    targets = (np.arange(N) < share * N).astype(np.int64)
    logit = rng.normal(size=N) + skill * (2 * targets - 1)
    second = 1 / (1 + np.exp(-logit))
    return ClassPredictions(0.5, np.stack([1 - second, second], axis=1), targets)


def scores(skill: float) -> ScorePredictions:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=N)
    return ScorePredictions(0.5, skill * targets + 0.3 * rng.normal(size=N), targets)


def labels(skill: float) -> LabelPredictions:
    rng = np.random.default_rng(0)
    targets = (rng.random((N, 3)) < [0.5, 0.2, 0.1]).astype(np.int64)
    return LabelPredictions(0.5, np.clip(rng.random((N, 3)) * 0.9 + skill * targets, 0, 1), targets, np.full(3, 0.8))


def tags(skill: float) -> TagPredictions:
    rng = np.random.default_rng(0)
    targets = np.where(rng.random((N, 5)) < 0.2, 1, 0)
    found = np.where(rng.random((N, 5)) < skill, targets, 0)
    return TagPredictions(0.5, found, targets, np.full((N, 5), 0.9), np.arange(N), ("O", "B-X"))


def pairs(skill: float, *, scored: bool) -> SimilarityPredictions:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, N, 8)).astype(np.float32)
    other = skill * one + (1 - skill) * other
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (one, other)]
    targets = (unit[0] * unit[1]).sum(axis=1).astype(np.float64) if scored and skill else rng.random(N)
    return SimilarityPredictions(0.5, unit[0], unit[1], targets if scored else None)


def compared(predictions: Predictions, names: list[str] | None = None) -> dict[str, Any] | None:
    return against_chance(predictions, names, metrics_of(predictions, resamples=200), resamples=400)


@pytest.mark.parametrize(
    ("good", "blind", "metric", "guess"),
    [
        (classes(2.0), classes(0.0), "accuracy", "always answering `1`"),
        (scores(1.0), scores(0.0), "rmse", "always answering the mean"),
        (labels(0.9), labels(0.0), "f1_micro", "always giving `0`"),
        (tags(0.7), tags(0.0), "entity_f1", "finding nothing"),
        (pairs(0.9, scored=True), pairs(0.0, scored=True), "spearman", "a random order"),
        (pairs(0.6, scored=False), pairs(0.0, scored=False), "reciprocal_rank", "a random order"),
    ],
    ids=["classes", "scores", "labels", "tags", "pairs with scores", "pairs"],
)
def test_against_chance_tells_a_guess_from_a_model(
    good: Predictions, blind: Predictions, metric: str, guess: str
) -> None:
    better, alike = compared(good), compared(blind)
    assert better is not None
    assert alike is not None
    assert better["metric"] == alike["metric"] == metric
    assert better["at_chance"] is False
    assert "text" not in better
    assert better["difference"]["low"] > 0
    assert alike["at_chance"] is True
    assert "is not shown to be better than" in alike["text"]
    assert "graftwerk errors" in alike["hint"]
    assert guess in alike["guess"]
    value = METRICS[metric].value(good)
    assert value is not None
    assert better["difference"]["value"] == pytest.approx(METRICS[metric].better(value, better["guess_value"]))


def test_against_chance_difference_is_paired_with_the_share_of_the_label() -> None:
    found = compared(classes(2.0), ["neg", "pos"])
    assert found is not None
    assert found["guess"] == "always answering `pos`"
    assert found["guess_value"] == pytest.approx(0.6)
    # Drawn apart, the two shares would vary by sqrt(.6 .4 / 200 + ...); drawn together their difference varies as
    # the rows that only one of them has right.
    predictions = classes(2.0)
    assert predictions.targets is not None
    each = (predictions.scores.argmax(axis=1) == predictions.targets) - (predictions.targets == 1).astype(float)
    half = 1.96 * each.std() / np.sqrt(N)
    assert found["difference"]["high"] - found["difference"]["low"] == pytest.approx(2 * half, rel=0.15)


def test_against_chance_few_rows_of_a_class_ranked_well_is_said_and_not_called_chance() -> None:
    predictions = classes(1.0, share=0.95)
    found = against_chance(predictions, None, metrics_of(predictions, resamples=200), resamples=400)
    assert found is not None
    assert found["difference"]["low"] <= 0
    assert found["at_chance"] is False
    assert "its scores rank rows better than chance (ROC-AUC" in found["text"]


@pytest.mark.parametrize(
    "predictions",
    [
        classes(1.0, share=1.0),
        ScorePredictions(0.5, np.zeros(N), np.full(N, 3.0)),
        LabelPredictions(0.5, np.full((N, 2), 0.9), np.zeros((N, 2), dtype=np.int64), np.full(2, 0.5)),
        TextPredictions(0.5, np.ones(N), np.ones(N, dtype=np.int64)),
    ],
    ids=["one class", "one number", "no labels", "texts"],
)
def test_against_chance_without_a_meaningful_guess_gives_none(predictions: Predictions) -> None:
    assert against_chance(predictions, None, {}, resamples=100) is None
