"""A budget for each method: what it may try, what it spent, and that trials do not see test rows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from graftwerk.cli.main import main
from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.budget import Budget, candidates, describe_budget, parse_budget, tuning_seed
from graftwerk.experiments.compare import compare
from graftwerk.experiments.driver import ComparisonDriver
from graftwerk.experiments.job_runner import JobRunner
from graftwerk.experiments.method_specs import parse_method_specs
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.workers import Workers
from graftwerk.methods.registry import METHODS
from graftwerk.training.run_dir import RunDir
from tests.cli.commands import run_file
from tests.experiments.here import InThisProcess


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (4, Budget(4)), ("4", Budget(4)), ("90s", Budget(200, 90.0)), ("10min", Budget(200, 600.0)),
        ("1.5 h", Budget(200, 5400.0)), (None, None),
    ],
)  # fmt: skip
def test_parse_budget_trials_and_times(given: Any, expected: Budget | None) -> None:
    assert parse_budget(given) == expected


@pytest.mark.parametrize("given", [0, "0", "0min", -1, "1.5", "ten", "4 trials", True, 201])
def test_parse_budget_wrong_ones_raise(given: Any) -> None:
    with pytest.raises(ConfigError, match="budget") as caught:
        parse_budget(given)
    assert "budget=4" in str(caught.value.hint)


def test_budget_of_time_allows_what_fits_and_always_a_first_trial() -> None:
    budget = Budget(200, 10.0)
    assert budget.allows([])
    assert budget.allows([4.0, 3.0]) is False  # a third one might take four seconds again
    assert budget.allows([3.0, 3.0])
    assert not budget.allows([12.0])
    assert (Budget(2).allows([9e9]), Budget(2).allows([1.0, 1.0])) == (True, False)


def test_sentence_names_what_was_spent_and_who_overdrew() -> None:
    spent = {
        "lora": {"trials": 1, "seconds": 12.0, "failed": 0},
        "ia3": {"trials": 3, "seconds": 9.0, "failed": 1},
    }
    said = describe_budget({"seconds": 10.0, "seed": 3, "spent": spent})
    assert "each method could spend 10 s of training" in said
    assert (
        "lora 1 in 12.0 s, ia3 3 in 9.0 s (1 failed); the first trial always runs, and is over the budget for lora"
        in said
    )
    assert "over the budget" not in describe_budget({"trials": 3, "seed": 3, "spent": spent})


def test_candidates_are_as_many_for_every_method_and_differ(tmp_path: Path) -> None:
    base = RunConfig.build({"model": "m", "method": "lora", "data": {"train": str(tmp_path / "rows.csv")}})
    for spec in parse_method_specs([*METHODS]):
        found = candidates(spec, base, {}, Budget(12))
        assert len({(str(one.method), one.changes["training.learning_rate"]) for one in found}) == 12, spec.name
        assert {one.tried_for for one in found} == {spec.name}
        assert found[0].method == spec.method
        assert candidates(spec, base, {}, Budget(5)) == found[:5]
    lora, *_ = parse_method_specs("lora")
    rates = [one.changes["training.learning_rate"] for one in candidates(lora, base, {}, Budget(3))]
    assert rates == [1e-3, 3e-3, 3.33e-4]
    sizes = {(one.method.r, one.method.lora_alpha) for one in candidates(lora, base, {}, Budget(20))}  # type: ignore[attr-defined]
    assert sizes == {(4, 8), (8, 16), (16, 32)}
    ia3, *_ = parse_method_specs("ia3")  # the learning rate alone: as many differ as a budget of time may want
    assert len({one.name for one in candidates(ia3, base, {}, Budget(200, 9.0))}) == 200
    own, *_ = parse_method_specs([{"name": "lora", "learning_rate": 1e-2}])
    assert candidates(own, base, {}, Budget(1))[0].changes == {"training.learning_rate": 1e-2}


def test_candidates_of_given_values_are_the_same_part_of_the_grid_for_all(tmp_path: Path) -> None:
    base = RunConfig.build({"model": "m", "method": "lora", "data": {"train": str(tmp_path / "rows.csv")}})
    axes = {"learning_rate": (1e-3, 3e-3, 1e-2), "warmup_ratio": (0.0, 0.1)}
    lora, ia3 = parse_method_specs("lora,ia3")
    changes = [[one.changes for one in candidates(spec, base, axes, Budget(4))] for spec in (lora, ia3)]
    assert changes[0] == changes[1]
    assert len(changes[0]) == 4
    assert len(candidates(lora, base, axes, Budget(99))) == 6
    with pytest.raises(ConfigError, match="of its own"):
        candidates(parse_method_specs([{"name": "ia3", "learning_rate": 1e-2}])[0], base, axes, Budget(4))


def test_tuning_seed_is_none_of_the_seeds() -> None:
    assert (tuning_seed([0, 1, 2]), tuning_seed([3, 1]), tuning_seed([7])) == (3, 0, 0)


def test_compare_with_a_budget_tunes_all_alike_and_leaves_test_rows_to_the_chosen(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48, "max_train_rows": 32},
        "training": {"max_steps": 2, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1, "resamples": 200},
        "output_dir": str(tmp_path / "cmp"),
    }
    told: list[ProgressEvent] = []
    found = compare(settings, "ia3,probe", [0], budget=2, listener=told.append)
    assert told[0].text == "2 methods, 2 trials for each to find its settings, then 1 seed (seeds=0): 2 runs"
    assert (told[-1].done, told[-1].total) == (6, 6)
    budget, tuning = found.result["budget"], found.result["tuning"]
    assert (budget["trials"], budget["seed"]) == (2, 1)
    assert {name: (one["trials"], one["failed"]) for name, one in budget["spent"].items()} == {
        "ia3": (2, 0), "probe": (2, 0),
    }  # fmt: skip
    assert all(one["seconds"] > 0 for one in budget["spent"].values())
    assert [method["name"] for method in found.result["methods"]] == [each["chosen"] for each in tuning]
    assert all([*method["runs"]] == ["0"] for method in found.result["methods"])
    manifests = {path.parent.name: json.loads(path.read_text()) for path in found.folder.glob("*/manifest.json")}
    trials = {name: manifest for name, manifest in manifests.items() if name.endswith("-seed1")}
    assert len(trials) == 4
    for name, manifest in trials.items():
        assert (manifest["status"], [*manifest["metrics"]]) == ("trial", ["validation"]), name
        assert not (found.folder / name / "predictions" / "test.jsonl").exists()
        assert not (found.folder / name / "evaluation.json").exists()
    assert found.table().count("each method could spend 2 trials on its settings") == 1
    assert "seed 1, which no result has" in found.table()
    assert found.result["command"].endswith("methods=ia3,probe seeds=0 budget=2")
    told.clear()
    again = compare(settings, "ia3,probe", [0], budget=2, listener=told.append)
    assert sum("already finished" in event.text for event in told) == 6
    assert (again.result["tuning"], again.result["budget"]) == (tuning, budget)


def test_compare_diverged_trial_keeps_what_it_spent_after_a_resume(tmp_path: Path) -> None:
    settings = {"model": "tiny", "data": {"train": "rows.csv", "validation": 8}, "output_dir": str(tmp_path / "cmp")}
    driver = ComparisonDriver(
        settings, parse_method_specs("ia3"), [0], {}, None, listener=lambda event: None, budget=parse_budget("10s")
    )
    trials = driver.trials
    assert trials is not None
    content = {"status": "diverged", "cost": {"training_seconds": 6.0}, "error": {"what": "the loss is nan"}}
    for spec in trials.tries["ia3"][:2]:
        folder = driver.folder_of(spec, trials.seed)
        folder.mkdir(parents=True)
        RunDir(folder).write_manifest(content)
    with Workers([JobRunner(tmp_path / "log")]) as workers:
        workers.do(partial(driver._next_trial, trials=trials, metric="accuracy", overwrite=False))
    assert trials.spent == {"ia3": [6.0]}  # a second one would not fit into ten seconds


def test_compare_command_with_budget(
    tmp_path: Path,
    tiny_encoder: Path,
    glosses: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_file(tmp_path, tiny_encoder, glosses, training={"max_steps": 2})
    given = ["compare", str(config), "methods=ia3,lora", "--dry-run"]
    assert main([*given, "budget=0"]) == 2
    assert "a budget of 0 lets no method try anything" in capsys.readouterr().err
    assert main([*given, "budget=4", "data.validation=null"]) == 2
    assert "is tuned on validation rows" in capsys.readouterr().err
    assert main([*given, "budget=4"]) == 0
    printed = capsys.readouterr().out
    assert "4 trials for each to find its settings, then 3 seeds (seeds=0,1,2): 6 runs, 28 steps" in printed
    assert main([*given, "budget=10min"]) == 0
    assert "10 min of training for each to find its settings" in capsys.readouterr().out


def test_compare_vary_split_draws_training_rows_by_seed_and_shares_test_rows(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48, "max_train_rows": 32},
        "training": {"max_steps": 1, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1, "resamples": 200},
        "output_dir": str(tmp_path / "cmp"),
    }
    with pytest.raises(ConfigError, match="cannot be varied"):
        compare(settings, "probe", [0, 1], vary="rows", quiet=True)
    found = compare(settings, "probe", [0, 1], vary="split", quiet=True, report=False)
    runs = [json.loads((found.folder / f"probe-seed{seed}" / "manifest.json").read_text()) for seed in (0, 1)]
    rows = [(found.folder / f"probe-seed{seed}" / "predictions" / "test.jsonl").read_text() for seed in (0, 1)]
    texts = [[json.loads(line)["text"] for line in each.splitlines()] for each in rows]
    assert texts[0] == texts[1]
    assert runs[0]["data"]["fingerprint"] != runs[1]["data"]["fingerprint"]
    assert found.result["command"].endswith("methods=probe seeds=0,1 vary=split")
    again = compare(settings, "probe", [0, 1], vary="split", quiet=True, report=False)
    assert again.result["methods"] == found.result["methods"]
    del settings["data"]["test"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no test rows to compare on"):
        compare(settings, "probe", [0, 1], vary="split", quiet=True, output_dir=str(tmp_path / "none"))
