"""`graftwerk plan`: what it prints, what it refuses, what makes a run fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftwerk.config import RunConfig
from graftwerk.methods.registry import METHODS
from graftwerk.training.planning import plan as planning
from graftwerk.training.planning.calibration import Calibration
from graftwerk.training.planning.plan import Planner
from graftwerk.training.train import train
from tests.cli.commands import Run, run_file


def test_plan_command_prints_memory_time_and_size(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = graftwerk("plan", config, "method=lora", "--fit", "1kB", "--json")
    assert said.code == 0, said.err
    plan = said.json
    memory = plan["memory"]
    assert memory["train_peak_bytes"] >= sum(size for key, size in memory.items() if "peak" not in key)
    assert memory["trained_bytes"] == plan["adapter_bytes"] > 0
    assert plan["time"]["epoch_seconds"] > plan["time"]["step_seconds"] > 0
    assert plan["fits"] is True
    assert plan["largest_batch"] > 16
    assert plan["fit"] is None
    assert sorted(tmp_path.rglob("*")) == before
    shown = graftwerk("plan", config, "--fit", "100GB").out
    assert "train peak" in shown
    assert "fits into 100 GB as it is" in shown


def test_plan_command_compares_all_methods(graftwerk: Run, config: Path) -> None:
    said = graftwerk("plan", config, "--table", "--json")
    assert said.code == 0, said.err
    assert [row["method"] for row in said.json["methods"]] == list(METHODS)
    peaks = {row["method"]: row["memory"]["optimizer_bytes"] for row in said.json["methods"] if "memory" in row}
    assert peaks["full"] == max(peaks.values())


@pytest.mark.parametrize("size", ["24 apples", "0", "-3GB"])
def test_plan_command_refuses_what_is_no_size(graftwerk: Run, config: Path, size: str) -> None:
    said = graftwerk("plan", config, f"--fit={size}")
    assert said.code == 2
    assert "--fit 24GB" in said.err


def test_fit_divides_the_batch_and_keeps_the_rows_of_a_step(config: Path) -> None:
    planner = Planner(RunConfig.load(config))
    peak = planner.plan()["memory"]["train_peak_bytes"]
    found = planner.fit(peak - 1)
    assert found is not None
    values = dict(each.split("=") for each in found["overrides"])
    size = int(values["training.per_device_train_batch_size"])
    assert size * int(values["training.gradient_accumulation_steps"]) == 16
    assert found["plan"]["memory"]["train_peak_bytes"] < peak


def test_train_that_cannot_fit_is_refused_with_what_would_fit(
    graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 1, "report_to": ["jsonl"], "processes": 1, "per_device_train_batch_size": 64}
    path = run_file(tmp_path, tiny_encoder, glosses, training=training, data={"train": str(glosses)})
    monkeypatch.setattr(planning, "calibration", lambda kind: Calibration(0.0, 1.0, 0))
    monkeypatch.setattr(Planner, "_metrics_bytes", lambda *_: 0)
    least = Planner(RunConfig.load(path)).plan(largest_batch=False)["memory"]["least_peak_bytes"]
    monkeypatch.setattr(planning, "available", lambda: least - 1)
    before = sorted(tmp_path.rglob("*"))
    for command in (("train", path), ("train", path, "--dry-run")):
        said = graftwerk(*command)
        assert said.code == 5, said.err
        assert "of weights" in said.err
        (found,) = re.findall(r"per_device_train_batch_size=(\d+) training.gradient_accumulation_steps=(\d+)", said.err)
        assert int(found[0]) * int(found[1]) == 64 > int(found[0])
        assert "training.check_memory=false" in said.err
    assert sorted(tmp_path.rglob("*")) == before
    assert train(RunConfig.load(path), quiet=True, check_memory=False).manifest["status"] == "finished"
