"""`graftwerk plan`: what it prints, what it refuses, what makes a run fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftwerk.config import RunConfig
from graftwerk.methods.registry import METHODS
from graftwerk.training.planning.plan import Planner
from tests.cli.commands import Run


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
