"""Time left, from what is known so far."""

from __future__ import annotations

from graftwerk.experiments.eta import EtaEstimator

PLAN = ["full", "lora", "full", "lora"]


def test_eta_before_any_progress_is_none() -> None:
    assert EtaEstimator(PLAN).left() is None


def test_eta_of_first_run_extrapolates_its_steps() -> None:
    """10 s gone, 50 s of steps left: 60 s a run, three more runs."""
    assert EtaEstimator(PLAN).left(10, 50) == 50 + 3 * 60


def test_eta_prefers_runs_of_same_method() -> None:
    pace = EtaEstimator(PLAN)
    pace.finished("full", 100)
    assert pace.left() == 300  # lora is not known yet: as long as the others
    pace.finished("lora", 40)
    assert pace.left() == 140
    assert pace.left(30) == 110
    assert pace.left(300) == 40  # it takes longer than expected, but not less than nothing
    assert pace.left(30, 50) == 90
    pace.finished("full", 200)
    pace.finished("lora", 40)
    assert pace.left() == 0


def test_eta_ignores_runs_finished_earlier() -> None:
    pace = EtaEstimator(PLAN)
    pace.finished("full", None)
    pace.finished("lora", None)
    assert pace.left() is None
    assert pace.left(5, 5) == 5 + 10
