"""Metrics against scikit-learn, intervals against a bootstrap that draws row by row, and what cannot be computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from benchmarks.interval_coverage import single_coverage
from graftwerk.errors import DataError, ModelError
from graftwerk.evaluation import metrics
from graftwerk.evaluation.bootstrap import draw_counts, kinds, percentile_interval, resample
from graftwerk.evaluation.class_metrics import rank_auc
from graftwerk.evaluation.metric import over_sets
from graftwerk.evaluation.metrics import metrics_of, point, row_effect, statistic_of
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.predictions import ClassPredictions, TextPredictions

METRICS = Classification.metrics


def made(n: int, classes: int, seed: int = 0, *, skill: float = 1.0, decimals: int | None = None) -> ClassPredictions:
    """Predictions of a model of some skill; with few decimals many scores are tied."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[targets]
    if decimals is not None:
        logits = logits.round(decimals)
    scores = np.exp(logits)
    return ClassPredictions(None, scores / scores.sum(1, keepdims=True), targets)


def by_sklearn(name: str, targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    predicted = scores.argmax(1)
    if name == "accuracy":
        return float(accuracy_score(targets, predicted, sample_weight=weights))
    if name.startswith("f1"):
        average = name.removeprefix("f1_")
        return float(f1_score(targets, predicted, average=average, sample_weight=weights, zero_division=0))
    if scores.shape[1] == 2:
        return float(roc_auc_score(targets, scores[:, 1], sample_weight=weights))
    return float(roc_auc_score(targets, scores, multi_class="ovr", average="macro", sample_weight=weights))


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_of_values_equal_scikit_learn(classes: int) -> None:
    predictions = made(300, classes)
    figures = metrics_of(predictions, [f"c{i}" for i in range(classes)], resamples=100)
    assert tuple(figures) == METRICS
    for name, figure in figures.items():
        assert figure["value"] == pytest.approx(by_sklearn(name, predictions.targets, predictions.scores), abs=1e-12)
        assert figure["low"] < figure["value"] < figure["high"], name
        assert "note" not in figure


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", METRICS)
def test_statistic_of_each_draw_equals_scikit_learn(name: str, classes: int) -> None:
    """The vectorised metrics, tied scores included, against scikit-learn with the same rows weighted one draw at a
    time.
    """
    predictions = made(14, classes, decimals=0)
    weights = next(draw_counts(np.ones(14, dtype=np.int64), 120, np.random.default_rng(1)))
    assert (weights.sum(axis=1) == 14).all()
    found = statistic_of(name, predictions)(weights)
    lacking = 0
    for draw, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(14), draw.astype(int))
        all_there = len(np.unique(predictions.targets[rows])) == classes
        lacking += not all_there
        if name == "roc_auc" and not all_there:
            assert np.isnan(value)
            continue
        wanted = by_sklearn(name, predictions.targets[rows], predictions.scores[rows])
        assert value == pytest.approx(wanted, abs=1e-12)
    assert classes == 2 or 10 < lacking < 110, "draws with and without all classes are to be seen"


def test_draw_counts_draws_rows_uniformly() -> None:
    for counts in (np.ones(5, dtype=np.int64), np.array([1, 1, 1, 2])):
        drawn = np.concatenate(list(draw_counts(counts, 4000, np.random.default_rng(0))))
        assert drawn.mean(axis=0) == pytest.approx(counts, rel=0.05)
        assert drawn[:, 0].var() == pytest.approx(0.8, rel=0.1)  # binomial: 5 draws of a fifth


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_rank_auc_equals_share_of_ordered_pairs(rows: list[tuple[bool, int, int]]) -> None:
    """Against the definition: the share of (positive, negative) pairs in the right order, ties half."""
    positive = np.array([row[0] for row in rows])
    scores = np.array([row[1] for row in rows], dtype=float)
    weights = np.array([row[2] for row in rows], dtype=float)
    found = rank_auc(positive, scores)(weights[None])[0]
    wins = pairs = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            pair = weights[i] * weights[j]
            pairs += pair
            wins += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    assert np.isnan(found) if pairs == 0 else found == pytest.approx(wins / pairs)


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "roc_auc"])
def test_metrics_of_interval_equals_row_by_row_bootstrap(name: str) -> None:
    """Cells of the confusion matrix drawn as counts have the law of rows drawn one by one."""
    predictions = made(120, 2, seed=3)
    targets, scores = predictions.targets, predictions.scores
    rng = np.random.default_rng(11)
    slow = []
    for _ in range(200):
        rows = rng.integers(0, 120, 120)
        slow.append(by_sklearn(name, targets[rows], scores[rows]))
    figure = metrics_of(predictions, None, resamples=4000)[name]
    low, high = np.quantile(slow, [0.025, 0.975])
    spread = np.std(slow)
    assert figure["low"] == pytest.approx(low, abs=0.4 * spread)
    assert figure["high"] == pytest.approx(high, abs=0.4 * spread)


def test_resample_over_confusion_cells_equals_binomial_spread() -> None:
    predictions = made(200, 2, seed=5)
    predicted = predictions.scores.argmax(1)
    (seen, given_), counts = kinds(predictions.targets, predicted)
    assert counts.sum() == 200
    assert len(counts) == 4
    rng = np.random.default_rng(0)
    by_cell = resample(counts, [lambda w: w @ (seen == given_) / w.sum(1)], 20_000, rng)[0]
    right = (predictions.targets == predicted).mean()
    assert by_cell.mean() == pytest.approx(right, abs=0.002)
    assert by_cell.std() == pytest.approx(np.sqrt(right * (1 - right) / 200), rel=0.03)


def test_percentile_interval_has_nominal_coverage() -> None:
    """Of 200 samples from a population whose accuracy is 0.7, about 190 intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        right = rng.random(150) < 0.7
        predictions = ClassPredictions(None, np.eye(2)[np.where(right, 0, 1)], np.zeros(150, dtype=int))
        statistic = statistic_of("accuracy", predictions)
        low, high = percentile_interval(resample(np.ones(150, dtype=np.int64), [statistic], 300, rng)[0], 0.95)
        held += low <= 0.7 <= high
    assert 180 <= held <= 198


def test_metrics_of_interval_depends_on_seed_and_confidence() -> None:
    predictions = made(80, 2)
    once, again = metrics_of(predictions, None), metrics_of(predictions, None)
    other, wide = metrics_of(predictions, None, seed=1), metrics_of(predictions, None, confidence=0.99)
    assert once == again != other
    for name in METRICS:
        assert wide[name]["high"] - wide[name]["low"] > once[name]["high"] - once[name]["low"]


def test_metrics_of_roc_auc_with_absent_class_is_undefined() -> None:
    predictions = made(30, 3)
    two = ClassPredictions(None, predictions.scores, predictions.targets % 2)
    figure = metrics_of(two, ["apple", "pear", "plum"])["roc_auc"]
    assert figure["value"] is figure["low"] is figure["high"] is None
    assert "`plum`" in figure["note"]
    assert "apple" not in figure["note"]
    assert point("roc_auc", two) is None
    one = ClassPredictions(None, np.full((4, 8), 1 / 8), np.zeros(4, dtype=np.int64))
    note = metrics_of(one, list("abcdefgh"), resamples=100)["roc_auc"]["note"]
    assert note.endswith("no row has the label `b`, `c`, `d`, `e`, `f` and 2 more")


def test_metrics_of_class_with_one_row_notes_undefined_draws() -> None:
    predictions = made(40, 2)
    targets = np.zeros(40, dtype=int)
    targets[7] = 1
    figure = metrics_of(ClassPredictions(None, predictions.scores, targets), None, resamples=400)["roc_auc"]
    assert "lack" in figure["note"]  # about e^-1 of the draws miss the one row
    assert figure["low"] <= figure["value"] <= figure["high"]


def test_metrics_of_too_few_defined_draws_give_no_interval() -> None:
    scores = np.full((4, 4), 0.25)
    figure = metrics_of(ClassPredictions(None, scores, np.arange(4)), None)["roc_auc"]
    assert figure["value"] == 0.5
    assert figure["low"] is None
    assert "no interval" in figure["note"]


def test_metrics_of_all_rows_right_have_exact_lower_bound() -> None:
    targets = np.arange(20) % 2
    figures = metrics_of(ClassPredictions(None, np.eye(2)[targets], targets), None)
    assert figures["accuracy"]["value"] == figures["accuracy"]["high"] == 1.0
    assert figures["accuracy"]["low"] == pytest.approx(0.05 ** (1 / 20))
    assert "no spread" in figures["accuracy"]["note"]
    for name in METRICS:  # F1 and ROC-AUC too: two classes of ten rows know as much as twenty rows
        assert figures[name]["low"] == pytest.approx(0.05 ** (1 / 20)), name
        assert (figures[name]["high"], figures[name]["note"]) == (1.0, figures["accuracy"]["note"]), name
    wrong = metrics_of(ClassPredictions(None, np.eye(2)[1 - targets], targets), None)["accuracy"]
    assert (wrong["value"], wrong["low"]) == (0.0, 0.0)
    assert wrong["high"] == pytest.approx(1 - 0.05 ** (1 / 20))


def test_row_effect_rare_class_weighs_more_in_macro_metrics() -> None:
    """40 and 10 rows, all right: macro F1 knows as little as 32 rows, weighted F1 and accuracy as much as 50."""
    targets = (np.arange(50) < 10).astype(int)
    perfect = ClassPredictions(None, np.eye(2)[targets], targets)
    assert row_effect("accuracy", perfect) == row_effect("f1_weighted", perfect) == pytest.approx(1 / 50)
    assert row_effect("f1_macro", perfect) == row_effect("roc_auc", perfect) == pytest.approx((1 / 40 + 1 / 10) / 4)
    assert metrics_of(perfect)["f1_macro"]["low"] == pytest.approx(0.05 ** (1 / 32))


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_weighted"])
@pytest.mark.parametrize("error", [0.005, 0.02])
def test_interval_of_nearly_perfect_classifier_has_nominal_coverage(metric: str, error: float) -> None:
    """50 rows, a fifth of the second class: draws of rows alone held it in 22 and 61 % for F1."""
    assert single_coverage(metric, 50, (0.8, 0.2), error, 60) >= 0.95


def test_metrics_of_invalid_predictions_raise() -> None:
    good = made(10, 2)
    with pytest.raises(DataError, match="no labels"):
        metrics_of(ClassPredictions(None, good.scores, None), None)
    with pytest.raises(DataError, match="no rows"):
        metrics_of(ClassPredictions(None, np.zeros((0, 2)), np.zeros(0, dtype=int)), None)
    with pytest.raises(ModelError, match="3 labels"):
        metrics_of(good, ["a", "b", "c"])
    broken = good.scores.copy()
    broken[3] = np.nan
    with pytest.raises(ModelError, match="not finite on 1 of 10"):
        metrics_of(ClassPredictions(None, broken, good.targets), None)


def test_draw_counts_many_rows_are_drawn_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwerk.evaluation import bootstrap

    monkeypatch.setattr(bootstrap, "BLOCK", 1000)
    blocks = list(draw_counts(np.ones(300, dtype=np.int64), 10, np.random.default_rng(0)))
    assert [len(block) for block in blocks] == [3, 3, 3, 1]
    assert all((block.sum(axis=1) == 300).all() for block in blocks)


def test_over_sets_is_the_mean_of_the_sets_and_none_if_one_has_no_value() -> None:
    rows = TextPredictions(None, np.array([0.5, 1.0]), np.array([1, 1]), sets=("a", "b"))
    defined = replace(metrics.METRICS["accuracy"], statistic=lambda some: lambda weights: weights @ some.nll)
    assert over_sets(defined).value(rows) == 0.75
    partly = replace(defined, statistic=lambda some: lambda weights: np.where(some.nll == 1.0, np.nan, 0.5))
    assert over_sets(partly).value(rows) is None
