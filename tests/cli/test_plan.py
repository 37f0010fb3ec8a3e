"""`graftwerk plan`: what it prints, what it refuses, what makes a run fit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from graftwerk.cli.plan import bytes_of
from graftwerk.config import RunConfig
from graftwerk.formatting import byte_size
from graftwerk.methods import registry
from graftwerk.methods.registry import METHODS
from graftwerk.training.planning import plan as planning
from graftwerk.training.planning.calibration import Calibration
from graftwerk.training.planning.call_times import LINEAR_SPEED, Speeds
from graftwerk.training.planning.plan import Planner
from graftwerk.training.train import train
from tests.cli.commands import Run, run_file


def test_plan_command_prints_memory_time_and_size(
    graftwerk: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available", lambda: 24 * 10**9)
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
    assert f"fits into the {byte_size(24 * 10**9)} available" in shown
    assert "processes" not in shown
    assert re.search(r"time +[1-9][\d.]* (µs|ms) a step", shown)  # of a tiny model, and not 0 s


@pytest.mark.parametrize("names", [("full", "lora", "prefix"), pytest.param((*METHODS,), marks=pytest.mark.slow)])
def test_plan_command_compares_all_methods(
    graftwerk: Run, config: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "METHODS", {name: METHODS[name] for name in names})
    said = graftwerk("plan", config, "--table", "--json")
    assert said.code == 0, said.err
    assert [row["method"] for row in said.json["methods"]] == [*names]
    peaks = {row["method"]: row["memory"]["optimizer_bytes"] for row in said.json["methods"] if "memory" in row}
    assert peaks["full"] == max(peaks.values())


@pytest.mark.parametrize("size", ["24 apples", "0", "-3GB"])
@pytest.mark.parametrize(("command", "option"), [("plan", "--fit"), ("recommend", "--memory")])
def test_command_refuses_what_is_no_size(graftwerk: Run, config: Path, size: str, command: str, option: str) -> None:
    said = graftwerk(command, config, f"{option}={size}")
    assert said.code == 2
    assert f"`{size}` is not a memory size" in said.err
    assert f"{option} 24GB" in said.err


def test_bytes_of_counts_binary_units_in_powers_of_1024() -> None:
    assert [bytes_of(text, "--fit") for text in ("24GiB", "24GB", "2 ki", "7")] == [24 << 30, 24 * 10**9, 2048, 7]


def figures(**changes: float) -> dict[str, float]:
    """Figures of a step of 16 rows, of 1000 bytes each."""
    parts = dict.fromkeys(("weights", "trained", "gradients", "optimizer", "cached", "kept", "evaluation_peak"), 0.0)
    parts["filling_peak"] = parts["errors"] = 0.0
    return {**parts, "held": 16e3, "beside": 0.0, "alive": 16e3, "step_peak": 16e3, "rows": 16.0, **changes}


@pytest.mark.parametrize(
    ("less", "largest"),
    [({"step_peak": 8e3, "rows": 8.0}, 100), ({"rows": 8.0}, None), ({"step_peak": 8e3}, None)],
)
def test_largest_batch_grows_by_the_rows_that_were_traced(
    config: Path, monkeypatch: pytest.MonkeyPatch, less: dict[str, float], largest: int | None
) -> None:
    monkeypatch.setattr(planning, "calibration", lambda kind: Calibration(0.0, 1.0, 0))
    planner = Planner(RunConfig.load(config, {"per_device_train_batch_size": 16}), num_processes=1)
    monkeypatch.setattr(planner, "_measured", lambda config: figures(**less))
    found = figures(alive=50e3, held=50e3, evaluation_peak=50e3)  # the peak is that of an evaluation
    memory = planner._memory(found, planner.config)
    assert planner._largest_batch(planner.config, found, memory, 100_000) == largest
    assert planner._largest_batch(planner.config, found, memory, 49_000) == 0
    assert planner._largest_batch(planner.config, {**found, "filling_peak": 200e3}, memory, 100_000) == 0


def test_fit_divides_the_batch_of_an_evaluation_that_is_the_peak(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(RunConfig.load(config, {"per_device_eval_batch_size": 64}), num_processes=1)

    def measured(config: RunConfig) -> dict[str, float]:
        step = 1e9 + config.training.per_device_train_batch_size
        evaluation = 1e8 * config.training.per_device_eval_batch_size
        alive = max(step, evaluation)
        return figures(alive=alive, held=alive, step_peak=step, evaluation_peak=evaluation)

    monkeypatch.setattr(planner, "_measured", measured)
    monkeypatch.setattr(planner, "plan", lambda config, largest_batch: {})
    found = planner.fit(4_000_000_000)
    assert found == {"overrides": ["training.per_device_eval_batch_size=32"], "plan": {}}
    assert planner.fit(1000) is None


@pytest.mark.parametrize(
    ("training", "evaluations"),
    [({"num_train_epochs": 1.5}, 1.5), ({"eval_steps": 1}, None), ({"max_steps": 1}, 1.0)],
)
def test_time_counts_steps_of_all_epochs_and_each_evaluation(
    config: Path, monkeypatch: pytest.MonkeyPatch, training: dict[str, float], evaluations: float | None
) -> None:
    monkeypatch.setattr(planning, "calibration", lambda kind: Calibration(0.0, 1.0, 0))
    monkeypatch.setattr(planning, "speeds_of", lambda dtype, kind: Speeds(1e9 / LINEAR_SPEED, 1.0, 1.0))
    monkeypatch.setattr(planning, "mean_step", lambda *_: SimpleNamespace(seconds=lambda traced, times: 2.0))
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    settings = {**batch, "num_train_epochs": 1, "max_steps": None, "eval_steps": None, **training}
    planner = Planner(RunConfig.load(config, settings), num_processes=1)
    an_epoch = math.ceil(len(planner.prepared.examples["train"]) / 6)
    steps = math.ceil(training.get("max_steps", training.get("num_train_epochs", 1) * an_epoch))
    held_out = sum(example.length for example in planner.prepared.examples["validation"])
    time = planner._time({"evaluated": 1e9}, planner.config)
    assert time["epoch_seconds"] == 2.0 * an_epoch
    evaluated = steps if evaluations is None else max(1.0, steps / an_epoch)
    assert time["training_seconds"] == pytest.approx(2.0 * steps + held_out * evaluated)
    _, changes = planner._changed(1, planner.config.training.eval_batch_size, False)
    assert changes == {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 6}


def test_plan_fits_if_the_peak_of_training_does(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(RunConfig.load(config), num_processes=1)
    found = figures(alive=50e3, held=50e3, evaluation=10e3)
    monkeypatch.setattr(planner, "_measured", lambda config: found)
    monkeypatch.setattr(planner, "_time", lambda found, config: {})
    peak = planner._memory(found, planner.config).train_peak_bytes
    for free, fits in ((peak, True), (peak - 1, False), (None, None)):
        monkeypatch.setattr(planner, "available", lambda free=free: free)
        assert planner.plan(largest_batch=False)["fits"] is fits


def test_fit_divides_the_batch_and_keeps_the_rows_of_a_step(config: Path) -> None:
    planner = Planner(RunConfig.load(config))
    peak = planner.plan(largest_batch=False)["memory"]["train_peak_bytes"]
    found = planner.fit(peak - 1, largest_batch=False)
    assert found is not None
    values = dict(each.split("=") for each in found["overrides"])
    size = int(values["training.per_device_train_batch_size"])
    assert size * int(values["training.gradient_accumulation_steps"]) == 16
    assert found["plan"]["memory"]["train_peak_bytes"] < peak


def test_train_that_cannot_fit_is_refused_with_what_would_fit(
    graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 1, "report_to": ["jsonl"], "processes": 1, "per_device_train_batch_size": 8}
    training["per_device_eval_batch_size"] = 2
    path = run_file(tmp_path, tiny_encoder, glosses, training=training, data={"train": str(glosses)})
    monkeypatch.setattr(planning, "calibration", lambda kind: Calibration(0.0, 1.0, 0))
    least = Planner(RunConfig.load(path)).plan(largest_batch=False)["memory"]["least_peak_bytes"]
    monkeypatch.setattr(planning, "available", lambda: least - 1)
    before = sorted(tmp_path.rglob("*"))
    for command in (("train", path), ("train", path, "--dry-run")):
        said = graftwerk(*command)
        assert said.code == 5, said.err
        assert "of weights" in said.err
        (found,) = re.findall(r"per_device_train_batch_size=(\d+) training.gradient_accumulation_steps=(\d+)", said.err)
        assert int(found[0]) * int(found[1]) == 8 > int(found[0])
        assert "training.check_memory=false skips this check" in said.err
    assert sorted(tmp_path.rglob("*")) == before
    assert train(RunConfig.load(path), quiet=True, check_memory=False).manifest["status"] == "finished"
