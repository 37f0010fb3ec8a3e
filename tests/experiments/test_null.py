"""Honesty of a comparison: the same method entered twice is not told apart, and a real difference is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwerk.evaluation.paired_bootstrap import JointBootstrap, Runs, joint_bootstrap
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.aggregation import measured_run
from graftwerk.experiments.compare import compare
from graftwerk.experiments.significance import verdict
from graftwerk.tasks.predictions import ClassPredictions
from tests.experiments.here import InThisProcess

REPETITIONS = 20
ROWS, SEEDS, SPREAD = 400, 3, 0.01


def method(share: float, rng: np.random.Generator, ease: np.ndarray[Any, Any]) -> Runs:
    """Answers of a method that gets about a share of the rows right: seeds shift it, and easy rows are easy for all.

    Args:
        share: Accuracy on an endless number of rows, over an endless number of seeds.
        rng: Draws the seeds' shifts and what each run makes of each row.
        ease: Place of each row between hard and easy, 0 to 1, common to all methods.
    """
    runs = {}
    for seed in range(SEEDS):
        shifted = share + SPREAD * rng.standard_normal()
        noise = rng.random(len(ease))
        right = np.where(rng.random(len(ease)) < 0.7, ease, noise) < shifted  # uniform, and so exact in its mean
        scores = np.zeros((len(ease), 2))
        scores[np.arange(len(ease)), right.astype(int)] = 1.0
        runs[seed] = ClassPredictions(None, scores, np.ones(len(ease), dtype=np.int64))
    return runs


def compared(gap: float, repetition: int) -> JointBootstrap:
    """Two methods whose true accuracies differ by a gap, on rows and with seeds of their own for each repetition."""
    rng = np.random.default_rng([round(gap * 1e6), repetition])
    ease = rng.random(ROWS)
    runs = {"a": method(0.75 + gap / 2, rng, ease), "b": method(0.75 - gap / 2, rng, ease)}
    return joint_bootstrap(runs, "accuracy", resamples=300, seed=repetition)


def verdicts(gap: float) -> Iterator[str]:
    for repetition in range(REPETITIONS):
        (difference,) = compared(gap, repetition).simultaneous(0.95)
        yield verdict(difference)


def test_one_method_entered_twice_is_seldom_told_apart() -> None:
    claimed = [found for found in verdicts(0.0) if found in ("better", "worse")]
    assert len(claimed) <= 2


@pytest.fixture(scope="module")
def smallest() -> float:
    """What such a comparison says that it would show four times in five: the median over some."""
    return float(np.median([compared(0.0, repetition).pairs.detectable(0.95)[0] for repetition in range(5)]))


def test_a_difference_of_twice_the_smallest_is_found(smallest: float) -> None:
    found = list(verdicts(2 * smallest))
    assert found.count("better") >= 0.8 * REPETITIONS
    assert "worse" not in found


def test_the_smallest_detectable_difference_is_found_four_times_in_five(smallest: float) -> None:
    """Within the error of 20 repetitions: neither always nor about half of the time."""
    assert 0.6 * REPETITIONS <= list(verdicts(smallest)).count("better") < REPETITIONS


@pytest.mark.slow
def test_one_method_of_tiny_models_entered_twice_is_seldom_told_apart(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve trained models of one method, halves of which pass for two methods in 20 ways."""
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 200, "max_train_rows": 96},
        "training": {"num_train_epochs": 2, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1},
        "output_dir": str(tmp_path / "cmp"),
    }
    found = compare(settings, "lora", range(12), quiet=True, report=False)
    results = [measured_run(found.folder / f"lora-seed{seed}") for seed in range(12)]
    runs = [result.predictions for result in results if result is not None]
    assert len(runs) == 12
    rng, claimed = np.random.default_rng(0), 0
    for _ in range(REPETITIONS):
        order = rng.permutation(12)[: 2 * SEEDS]
        a, b = (dict(enumerate(runs[at] for at in half)) for half in np.split(order, 2))
        (difference,) = joint_bootstrap({"a": a, "b": b}, "accuracy", resamples=500).simultaneous(0.95)
        claimed += verdict(difference) in ("better", "worse")
    assert claimed <= 2
