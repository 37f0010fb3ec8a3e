"""Values tried for each method of a comparison: chosen on validation rows, and only what was chosen is ranked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftwerk.cli.compare import read_settings
from graftwerk.cli.main import main
from graftwerk.errors import ConfigError
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.compare import compare
from graftwerk.experiments.method_specs import parse_method_specs
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.tuning import chosen, describe_tuning, planned_runs, read_axes, tuned
from graftwerk.training.train import train
from tests.cli.commands import run_file
from tests.experiments.here import InThisProcess


def test_read_axes_separates_several_values_from_one() -> None:
    _, _, overrides = read_settings(
        ["methods=lora", "lr=1e-3,3e-3", "warmup_ratio=0.1", "data.test=9", "batch_size=[4, 8]"]
    )
    axes, others = read_axes(overrides)
    assert axes == {"learning_rate": (1e-3, 3e-3), "per_device_train_batch_size": (4, 8)}
    assert others == {"warmup_ratio": 0.1, "data.test": 9}
    assert read_axes({"training.learning_rate": [1e-3, "auto"]})[0] == {"learning_rate": (1e-3, "auto")}
    assert read_axes({"report_to": ["jsonl"], "learning_rate": 1e-3})[0] == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"learning_rate": "1e-3,"}, "empty value"),
        ({"learning_rate": []}, "empty value"),
        ({"learning_rate": "1e-3,0.001"}, "twice"),
        ({"learning_rate": "1e-3,fast"}, "learning_rate"),
        ({"lr_scheduler_type": "linear,square"}, "square"),
    ],
)
def test_read_axes_wrong_values_raise(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_axes(overrides)


def test_tuned_method_with_a_value_of_its_own_raises() -> None:
    specs = parse_method_specs(["lora", {"name": "ia3", "learning_rate": 1e-2}])
    with pytest.raises(ConfigError, match="of its own"):
        tuned(specs, {"learning_rate": (1e-3, 3e-3)})
    crossed = tuned(specs, {"weight_decay": (0.0, 0.1), "warmup_ratio": (0.0, 0.5)})
    assert len(crossed) == len({spec.name for spec in crossed}) == 8
    assert {spec.tried_for for spec in crossed} == {spec.name for spec in specs}
    assert planned_runs(specs, {"weight_decay": (0.0, 0.1)}, [0, 1, 2]) == (
        "2 methods, 2 values of weight_decay, 3 seeds (seeds=0,1,2): 12 runs"
    )
    assert planned_runs(specs[:1], {}, [3]) == "1 method, 1 seed (seeds=3): 1 run"


def result(validation: float, test: float) -> Any:
    manifest = {"metrics": {"validation": {"accuracy": {"value": validation}}, "test": {"accuracy": {"value": test}}}}
    return SimpleNamespace(manifest=manifest)


def test_chosen_is_the_best_on_validation_rows_and_not_on_test_rows() -> None:
    low, high, other = specs = [
        *tuned(parse_method_specs("lora"), {"learning_rate": (1e-3, 3e-3)}), *parse_method_specs("ia3"),
    ]  # fmt: skip
    runs = {
        low.name: {0: result(0.70, 0.9), 1: result(0.72, 0.9)},
        high.name: {0: result(0.74, 0.1), 1: result(0.76, 0.1)},
        other.name: {0: result(0.1, 0.1)},
    }
    ranked, told = chosen(specs, runs, {}, "accuracy")
    assert ranked == [high, other]
    assert [(one["name"], round(one["value"], 3)) for one in told[0]["tried"]] == [(low.name, 0.71), (high.name, 0.75)]
    (said,) = describe_tuning(told)
    for words in ("lora is ranked with learning_rate 0.003", "validation rows", "learning_rate 0.001: 71.0"):
        assert words in said
    # a value that did not come to an end with every seed does not stand for the method
    ranked, told = chosen(specs, {**runs, high.name: {0: result(0.99, 0.9)}}, {high.name: {1: "diverged"}}, "accuracy")
    assert ranked == [low, other]
    assert "99.0 (1 failed)" in describe_tuning(told)[0]
    ranked, _ = chosen(specs, {}, {}, "accuracy")
    assert ranked == [low, other]


def test_compare_tunes_on_validation_and_ranks_what_was_chosen(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48, "max_train_rows": 32},
        "training": {"max_steps": 2, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1},
        "output_dir": str(tmp_path / "cmp"),
    }
    told: list[ProgressEvent] = []
    found = compare(settings, "ia3,probe", [0], learning_rate="1e-3,1e-1", listener=told.append)
    said = [event.text for event in told]
    assert said[0] == "2 methods, 2 values of learning_rate, 1 seed (seeds=0): 4 runs"
    assert sum(text.startswith("validation accuracy ") for text in said) == 4
    methods, tuning = found.result["methods"], found.result["tuning"]
    assert [each["method"] for each in tuning] == ["ia3", "probe"]
    assert [method["name"] for method in methods] == [each["chosen"] for each in tuning]
    assert (found.result["split"], found.result["rows"]) == ("test", 48)
    for each in tuning:
        best = max(each["tried"], key=lambda one: one["value"])["value"]
        assert next(one["value"] for one in each["tried"] if one["name"] == each["chosen"]) == best
    assert found.table().count("chosen by accuracy on the validation rows") == 2
    assert "chosen by accuracy on the validation rows" in (tmp_path / "cmp" / "report.html").read_text()
    assert found.result["command"].endswith("methods=ia3,probe seeds=0 learning_rate=0.001,0.1")
    chosen_ones = {each["chosen"] for each in tuning}
    for each in tuning:
        for one in each["tried"]:
            run = tmp_path / "cmp" / f"{one['name']}-seed0"
            manifest = json.loads((run / "manifest.json").read_text())
            ranked = one["name"] in chosen_ones
            assert manifest["status"] == ("finished" if ranked else "trial")
            assert [*manifest["metrics"]] == (["validation", "test"] if ranked else ["validation"])
            assert (run / "predictions" / "test.jsonl").exists() is ranked
            assert (run / "evaluation.json").exists() is ranked
            assert manifest["metrics"]["validation"]["accuracy"]["value"] == one["value"]
            assert manifest["cost"]["first_step_seconds"] > 0  # of the training, not of the call that measured the rest
            assert "its settings were not chosen" in (run / "report.html").read_text() or ranked
    chosen_run = json.loads((tmp_path / "cmp" / f"{tuning[0]['chosen']}-seed0" / "manifest.json").read_text())
    rate = next(one["changes"] for one in tuning[0]["tried"] if one["name"] == tuning[0]["chosen"])
    alone = train({**settings, "method": "ia3"}, output_dir=str(tmp_path / "alone"), quiet=True, **rate)
    assert alone.manifest["metrics"] == chosen_run["metrics"]
    told.clear()
    again = compare(settings, "ia3,probe", [0], listener=told.append, **{"training.learning_rate": [1e-3, 1e-1]})
    assert sum("already finished" in event.text for event in told) == 4
    assert again.result["tuning"] == tuning


def test_compare_without_validation_rows_has_nothing_to_tune_on(
    tmp_path: Path,
    tiny_encoder: Path,
    glosses: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    config = run_file(tmp_path, tiny_encoder, glosses, training={"max_steps": 2})
    given = ["compare", str(config), "methods=ia3,lora", "learning_rate=1e-3,1e-1"]
    for more in ([], ["--dry-run"]):
        assert main([*given, "data.validation=null", *more]) == 2
        said = capsys.readouterr().err
        assert "there are none" in said
        assert "data.validation=0.1" in said
    assert main([*given, "--dry-run"]) == 0
    assert "2 methods, 2 values of learning_rate, 3 seeds (seeds=0,1,2): 12 runs, " in capsys.readouterr().out
