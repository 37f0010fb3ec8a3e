"""Runs that cannot fit are refused before anything is written; the plan stands beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.errors import MemoryShortage
from graftwerk.experiments.jobs import perform
from graftwerk.formatting import byte_size
from graftwerk.reporting.html import write_report
from graftwerk.training.planning import memory_check
from graftwerk.training.planning import plan as planning
from graftwerk.training.planning.plan import Planner
from graftwerk.training.progress_display import describe_planned
from graftwerk.training.train import train
from tests.cli.commands import run_file

SMALL = {"max_steps": 1, "per_device_train_batch_size": 16, "report_to": ["jsonl"], "processes": 1}


@pytest.fixture
def path(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> Path:
    return run_file(tmp_path, tiny_encoder, glosses, training=SMALL, data={"train": str(glosses)})


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_available(size: int) -> None:
        monkeypatch.setattr(planning, "available", lambda: size)

    return set_available


def test_compare_names_the_method_that_cannot_fit(path: Path, memory: Any, tmp_path: Path) -> None:
    memory(1000)
    tree = RunConfig.load(path).model_dump(mode="json")
    with pytest.raises(MemoryShortage, match="training `lora` needs") as raised:
        perform({"kind": "check", "configs": {"lora": tree}, "runs": {}}, lambda message: None)
    weights = Planner(RunConfig.load(path)).plan(largest_batch=False)["memory"]["weights_bytes"]
    assert f"({byte_size(weights)} of weights" in raised.value.what
    assert "method `lora`" in str(raised.value.where)
    assert "a smaller model" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_run_above_the_plan_alone_trains_with_a_warning(
    path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.load(path)
    least = Planner(config).plan(largest_batch=False)["memory"]["least_peak_bytes"]
    memory(least + 1)
    warned: list[str] = []
    run = train(config, listener=lambda event: warned.append(event.values["text"]) if event.kind == "warning" else None)
    assert any("it may not fit" in text for text in warned)
    assert run.manifest["cost"]["planned_peak_memory_bytes"] > least


def test_small_run_is_not_traced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", None)
    cost = train(RunConfig.load(path), quiet=True).manifest["cost"]
    assert not [key for key in cost if key.startswith("planned")]


def test_upper_bound_covers_the_plan(path: Path) -> None:
    planner = Planner(RunConfig.load(path))
    bound = memory_check.upper_bound(planner.config, planner.prepared, planner.architecture)
    assert planner.plan(largest_batch=False)["memory"]["train_peak_bytes"] < bound < 8 << 30
    planner.architecture.num_experts = 8
    assert memory_check.upper_bound(planner.config, planner.prepared, planner.architecture) == float("inf")


def test_long_run_has_plan_beside_measured_and_calibrates(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory_check, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(planning, "products_held", lambda _: -(1 << 30))  # here much of the heap is warm already
    monkeypatch.setattr(planning, "held_by_libc", lambda *_: 0)  # two replays differ by where the heap begins
    run = train(RunConfig.load(path), quiet=True, max_steps=3)
    cost = run.manifest["cost"]
    assert "planned_peak_memory_bytes" in cost
    assert cost["planned_step_seconds"] > 0
    assert cost["step_seconds"] > 0
    learnt = Planner(RunConfig.load(path)).plan(largest_batch=False)  # half way between the default and the one run
    assert learnt["calibration"]["runs"] == 1
    apart = [cost[key] - cost[f"planned_{key}"] for key in ("peak_memory_bytes", "step_seconds")]
    assert learnt["memory"]["train_peak_bytes"] - cost["planned_peak_memory_bytes"] == pytest.approx(
        apart[0] / 2, abs=2
    )
    assert learnt["time"]["step_seconds"] - cost["planned_step_seconds"] == pytest.approx(apart[1] / 2)
    assert describe_planned(cost).count("(planned ") == 2
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["cost"]["planned_peak_memory_bytes"] == cost["planned_peak_memory_bytes"]
    assert write_report(run.folder).read_text().count("planned") == 2


def test_run_that_cannot_be_planned_trains(path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("aten::nonzero wants values")

    memory(1000)
    monkeypatch.setattr(planning, "trace_step", broken)
    warned: list[str] = []
    config = RunConfig.load(path)
    assert train(config, listener=lambda event: warned.append(str(event.values))).manifest["status"] == "finished"
    assert any("aten::nonzero wants values" in text for text in warned)


def test_plan_of_cached_layers_counts_their_states_and_skips_them(path: Path) -> None:
    settings = {
        "method": {"name": "lora", "layers": "top-1"},
        "training.num_train_epochs": 2,
        "training.max_steps": None,
    }
    planner = Planner(RunConfig.load(path, settings))
    every = planner.plan(largest_batch=False)
    tree = planner.config.model_dump(mode="json")
    cached = planner.plan(RunConfig.build(tree, {"training.trunk_cache": True}), largest_batch=False)
    assert every["memory"]["cached_bytes"] == 0 < cached["memory"]["cached_bytes"]
    assert cached["time"]["step_seconds"] < every["time"]["step_seconds"]


def test_plan_of_two_processes_divides_rows_and_counts_both(path: Path) -> None:
    one = Planner(RunConfig.load(path))
    two = Planner(RunConfig.load(path, {"processes": 2}), replace(one.prepared))
    alone, shared = one.plan(largest_batch=False), two.plan(largest_batch=False)
    assert shared["traced"]["rows"] == 8
    assert shared["memory"]["weights_bytes"] == 2 * alone["memory"]["weights_bytes"]
    assert shared["memory"]["activations_bytes"] == pytest.approx(alone["memory"]["activations_bytes"], rel=0.1)
    assert shared["time"]["step_seconds"] < alone["time"]["step_seconds"]


def test_plan_of_quantized_base_counts_codes_in_place_of_weights(path: Path) -> None:
    plans = {
        name: Planner(RunConfig.load(path, {"quantization": settings})).plan(largest_batch=False)["memory"]
        for name, settings in (
            ("full", None),
            ("int8", "int8"),
            ("skips", {"name": "nf4", "skip": ["layer.1.output"]}),
            ("nf4", "nf4"),
        )
    }
    weights = [each["weights_bytes"] for each in plans.values()]
    assert weights == sorted(set(weights), reverse=True)
    assert len({each["trained_bytes"] for each in plans.values()}) == 1
    assert plans["nf4"]["least_peak_bytes"] < plans["full"]["least_peak_bytes"]


def test_plan_of_a_start_from_errors_counts_those_that_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_step = planning.trace_step
    monkeypatch.setattr(planning, "trace_step", lambda *of, **types: replace(trace_step(*of, **types), codes=10**9))
    alive = {}
    for start in ("qera", "true"):
        config = RunConfig.load(path, {"quantization": "nf4", "method.init_lora_weights": start})
        alive[start] = Planner(config)._measured(config)["alive"]
    assert alive["qera"] == 10**9
    assert alive["true"] < alive["qera"] / 2


def test_launched_run_that_the_plan_does_not_describe_teaches_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "learn", None)
    monkeypatch.setattr(memory_check, "Planner", None)
    state, clock = SimpleNamespace(seconds=99.0), SimpleNamespace(mean_step_seconds=1.0)
    trainer: Any = SimpleNamespace(state=state, clock=clock, distributed=SimpleNamespace(world_size=2))
    config = RunConfig.load(path)
    assert memory_check.planned_cost({"memory": {}}, config, None, 1, trainer, 10**9) == {}  # type: ignore[arg-type]


def test_planned_of_processes_that_share_the_base_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "FSDP" in memory_check.planned(None)["why_not"]  # type: ignore[arg-type]
