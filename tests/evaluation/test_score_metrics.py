"""Correlations, errors, and F1 of several labels: against scipy and scikit-learn, also draw by draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, mean_squared_error

from graftwerk.errors import DataError
from graftwerk.evaluation.metrics import METRICS, check, metrics_of
from graftwerk.evaluation.paired_bootstrap import paired_difference
from graftwerk.evaluation.results_io import load_evaluation, store_evaluation
from graftwerk.experiments.significance import describe_difference
from graftwerk.reporting import numbers
from graftwerk.serialization.info import OWN_FILE
from graftwerk.tasks.predictions import LabelPredictions, Predictions, ScorePredictions

RNG = np.random.default_rng(0)
N = 150


def scores(seed: int = 0, noise: float = 1.0) -> ScorePredictions:
    """Numbers with one decimal, so that many are tied."""
    rng = np.random.default_rng(seed)
    targets = np.random.default_rng(9).normal(size=N).round(1)
    return ScorePredictions(0.5, (targets + noise * rng.normal(size=N)).round(1), targets)


def labels(seed: int = 0) -> LabelPredictions:
    rng = np.random.default_rng(seed)
    targets = (np.random.default_rng(9).random((N, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.int64)
    return LabelPredictions(0.5, (0.4 * targets + rng.random((N, 4))).round(2), targets, np.array([0.7, 0.8, 0.9, 0.7]))


def by_others(name: str, predictions: Predictions, rows: np.ndarray) -> float:
    if isinstance(predictions, ScorePredictions):
        assert predictions.targets is not None
        values, targets = predictions.values[rows], predictions.targets[rows]
        own: dict[str, Callable[[], float]] = {
            "pearson": lambda: pearsonr(values, targets)[0],
            "spearman": lambda: spearmanr(values, targets)[0],
            "rmse": lambda: mean_squared_error(targets, values) ** 0.5,
            "mae": lambda: mean_absolute_error(targets, values),
        }
        return float(own[name]())
    assert isinstance(predictions, LabelPredictions)
    assert predictions.targets is not None
    wanted = predictions.targets[rows]
    if name == "average_precision":
        return float(average_precision_score(wanted, predictions.scores[rows], average="macro"))
    average = "micro" if name == "f1_micro" else "macro"
    return float(f1_score(wanted, predictions.given[rows], average=average, zero_division=0))


CASES: list[tuple[str, Callable[..., Predictions]]] = [
    *((name, scores) for name in ("pearson", "spearman", "rmse", "mae")),
    *((name, labels) for name in ("f1_micro", "f1_labels", "average_precision")),
]


@pytest.mark.parametrize(("name", "made"), CASES)
def test_metric_over_all_rows_and_each_draw_equals_other_libraries(name: str, made: Callable[..., Predictions]) -> None:
    predictions = made()
    figure = metrics_of(predictions, resamples=200)[name]
    assert figure["value"] == pytest.approx(by_others(name, predictions, np.arange(N)), abs=1e-12)
    assert None not in figure.values()
    assert figure["low"] < figure["value"] < figure["high"]  # type: ignore[operator]
    drawn = [RNG.integers(0, N, N) for _ in range(20)]
    weights = np.stack([np.bincount(rows, minlength=N) for rows in drawn]).astype(float)
    expected = [by_others(name, predictions, rows) for rows in drawn]
    np.testing.assert_allclose(METRICS[name].statistic(predictions)(weights), expected, atol=1e-12)


def test_metrics_of_numbers_beyond_float64_are_undefined() -> None:
    beyond = ScorePredictions(None, np.array([1e200, 1.0, 2.0]), np.array([0.0, 1.0, 3.0]))
    with np.errstate(over="ignore"):
        assert METRICS["rmse"].value(beyond) is None  # its square is infinite, which JSON does not hold
    assert METRICS["mae"].value(beyond) == pytest.approx(1e200 / 3)


@pytest.mark.parametrize("shift", [0.0, 1e9])
def test_correlation_of_constant_answers_is_undefined_and_far_from_zero_exact(shift: float) -> None:
    few = scores()
    assert few.targets is not None
    constant = ScorePredictions(None, np.full(N, 0.1 + shift), few.targets)
    assert metrics_of(constant, resamples=100)["pearson"]["value"] is None
    moved = ScorePredictions(None, few.values + shift, few.targets + shift)
    assert METRICS["pearson"].value(moved) == pytest.approx(METRICS["pearson"].value(few), abs=1e-6)


def test_average_precision_leaves_out_labels_that_no_row_has() -> None:
    few = labels()
    assert few.targets is not None
    targets = few.targets.copy()
    targets[:, 3] = 0
    without = LabelPredictions(None, few.scores, targets, few.thresholds)
    value = METRICS["average_precision"].value(without)
    assert value == pytest.approx(average_precision_score(targets[:, :3], few.scores[:, :3]), abs=1e-12)


@pytest.mark.parametrize("made", [scores, labels])
def test_check_rows_without_answers_or_with_broken_ones_raises(made: Callable[..., Predictions]) -> None:
    from dataclasses import replace

    predictions = made()
    with pytest.raises(DataError, match="no labels"):
        check(replace(predictions, targets=None))  # type: ignore[call-arg]
    name = predictions.arrays[0]
    broken = getattr(predictions, name).copy()
    broken[3] = np.nan
    assert replace(predictions, **{name: broken}).bad_rows == 1


@pytest.mark.parametrize("made", [scores, labels])
def test_stored_predictions_are_read_as_they_were(made: Callable[..., Predictions], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / OWN_FILE).write_text("{}")
    predictions = made()
    store_evaluation(tmp_path, tmp_path / "adapter", {"labels": list("abcd")}, predictions)
    found = load_evaluation(tmp_path, tmp_path / "adapter")
    assert found is not None
    assert type(found[1]) is type(predictions)
    for name in predictions.arrays:
        np.testing.assert_array_equal(getattr(found[1], name), getattr(predictions, name))
    assert found[1].same_rows(predictions)
    assert found[1].answers("f1_micro", cells=False) == predictions.answers("f1_micro", cells=False)


@pytest.mark.parametrize(("name", "made"), CASES)
def test_paired_difference_of_a_better_and_a_worse_model_has_its_direction(
    name: str, made: Callable[..., Predictions]
) -> None:
    better, worse = (scores(1, 0.3), scores(2, 2.0)) if made is scores else (labels(1), labels(2))
    if isinstance(worse, LabelPredictions):
        worse = LabelPredictions(None, 1 - worse.scores, worse.targets, worse.thresholds)
    found = paired_difference(better, worse, metric=name, resamples=300)
    assert (found["value"] < 0) == (METRICS[name].higher is False)
    assert paired_difference(better, better, metric=name, resamples=300)["value"] == 0


def test_differences_are_shown_in_the_units_of_the_metric() -> None:
    def said(name: str, value: float) -> str:
        return describe_difference(
            {"a": "a", "b": "b", "value": value, "low": value - 0.001, "high": value + 0.001, "p": None}, name
        )

    assert said("pearson", 0.0123) == "better by 1.2 points [1.1, 1.3]"
    assert said("rmse", -0.0123) == "better by 0.0123 [0.0113, 0.0133]"
    assert numbers.bare("rmse", 12345.6) == "12,346"
    assert numbers.value_of("pearson", 0.8634) == "86.3"
    assert numbers.heading("pearson") == "Pearson, \N{MULTIPLICATION SIGN} 100"
    assert numbers.signed("mae", -0.0123) == "\N{MINUS SIGN}0.0123"
