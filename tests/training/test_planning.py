"""The plan of a run: bytes of a traced step against a real one, allocators, and what `graftwerk plan` says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from array import array
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from graftwerk.config import RunConfig
from graftwerk.methods.base_weights import is_quantized
from graftwerk.models import hardware
from graftwerk.models.load import load_config
from graftwerk.models.quantization import Quantization
from graftwerk.tasks.base import Example
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.planning import calibration as calibrating
from graftwerk.training.planning import call_times, step_trace
from graftwerk.training.planning import plan as planning
from graftwerk.training.planning.allocator import (
    AFTERWARDS,
    PRODUCT,
    STEPS,
    Series,
    held_by_cuda,
    held_by_libc,
    products_held,
    repeated,
)
from graftwerk.training.planning.calibration import NAME, PROCESS_BYTES, Calibration, calibration, learn
from graftwerk.training.planning.call_times import (
    ATTENTION_SPEED,
    IN_STEP,
    LINEAR_SPEED,
    MOVED_SPEED,
    CallTimes,
    Speeds,
    speeds_of,
)
from graftwerk.training.planning.meter import Call, Meter, Operand, Work
from graftwerk.training.planning.plan import Planner
from graftwerk.training.planning.step_time import (
    CALL,
    STEP,
    MeanStep,
    StepWork,
    evaluated_shapes,
    mean_step,
    shapes_of,
)
from graftwerk.training.planning.without_values import quantize, without_masks
from graftwerk.training.retention.self_replay import SelfReplay
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.setup import prepare

SIZES = st.lists(st.integers(1, 40 << 20), min_size=1, max_size=12)


class RealTensors(nullcontext[None]):
    """In place of torch's `FakeTensorMode`: tensors keep their values."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def from_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


def traced(config: RunConfig, folder: Path) -> step_trace.StepTrace:
    config = config.anchored()
    prepared = prepare(config, lambda event: None)
    architecture = load_config(config.model)
    for key, value in prepared.task.model_kwargs(prepared.splits).items():
        setattr(architecture, key, value)
    return step_trace.trace_step(
        config, prepared, architecture, folder / "none", dtype=torch.float32, weights_dtype=torch.float32
    )


def total(step: StepWork, what: str | None = None) -> float:
    """Return the calls of a step's micro-batches, or the sum of what they do."""
    return sum(work.times * (1 if what is None else getattr(work, what)) for work in step.calls.values())


@pytest.mark.parametrize(
    ("kind", "task", "method", "training"),
    [
        ("encoder", "classification", "lora", {}),
        ("encoder", "classification", "full", {"gradient_accumulation_steps": 2}),
        ("encoder", "classification", "bottleneck", {"gradient_checkpointing": True}),
        ("encoder", "classification", "bitfit", {}),
        ("decoder", "causal", {"name": "lora", "lora_dropout": 0.1}, {}),
        ("decoder", "causal", "prefix", {}),
        ("decoder", "causal", "dora", {}),
        ("decoder", "causal", {"name": "lora", "layers": "top-1"}, {"trunk_cache": "auto", "num_train_epochs": 2}),
        ("encoder", "classification", {"name": "lora", "layers": "top-1"}, {"trunk_cache": True}),
    ],
)
def test_trace_of_step_has_the_bytes_of_a_real_step(
    kind: str,
    task: str,
    method: Any,
    training: dict[str, Any],
    request: pytest.FixtureRequest,
    glosses: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = {} if task == "classification" else {"columns": {"text": "text"}}
    config = RunConfig.build(
        {
            "model": str(request.getfixturevalue(f"tiny_{kind}")),
            "task": task,
            "method": method,
            "data": {"train": str(glosses), **columns},
            "training": {"per_device_train_batch_size": 4, "trunk_cache": False, **training},
            "output_dir": str(tmp_path / "run"),
        },
        {},
    )
    update, stored = DynamicCache.update, list[bool]()

    def store(self: DynamicCache, *given: Any, **more: Any) -> Any:
        stored.append(torch.is_grad_enabled())
        return update(self, *given, **more)

    if method != "prefix":  # a prefix is such a cache
        monkeypatch.setattr(DynamicCache, "update", store)
    planned = traced(config, tmp_path)
    assert all(stored), "an evaluation stores no keys and values"
    monkeypatch.setattr(step_trace, "FakeTensorMode", RealTensors)
    monkeypatch.setattr(step_trace, "CacheWithoutValues", ActivationCache)
    real = traced(config, tmp_path)
    assert planned.weights == real.weights > 0
    assert planned.trained == real.trained > 0
    if not config.training.gradient_checkpointing:  # there one hidden state more is alive when the model returns
        assert planned.kept == pytest.approx(real.kept, rel=0.02)
    assert planned.step_peak == pytest.approx(real.step_peak, rel=0.02)
    assert planned.evaluation_peak == pytest.approx(real.evaluation_peak, rel=0.02)
    assert planned.cached == real.cached
    assert (planned.cached > 0) == (config.training.trunk_cache is not False)
    assert (planned.filling_peak > 0) == (planned.cached > 0)
    # The real cache compares two passes to find dropout, and leaves out a mask of ones alone.
    assert planned.filling_peak == pytest.approx(real.filling_peak, rel=0.1)
    operations = total(planned.work, "operations"), total(real.work, "operations")
    assert operations[0] == pytest.approx(operations[1], rel=0.01)  # the first real pass probes the head
    assert not (tmp_path / "none").exists()


def test_trace_with_losses_against_forgetting_has_the_bytes_of_a_real_step(
    tiny_decoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Any] = {
        "model": str(tiny_decoder), "task": "causal", "method": "lora", "output_dir": str(tmp_path / "run"),
        "data": {"train": str(glosses), "columns": {"text": "text"}, "max_train_rows": 40},
        "training": {"per_device_train_batch_size": 4}, "evaluation": {"retained": {"general": "general"}},
    }  # fmt: skip
    strategies = dict.fromkeys(("replay", "self_replay", "distillation", "consolidation"), 0.5)
    tree["training"]["retain"] = {**strategies, "early_stopping": True}
    config = RunConfig.build(tree)
    planned = traced(config, tmp_path)
    monkeypatch.setattr(SelfReplay, "start", SelfReplay.hold)  # what is written may be shorter
    monkeypatch.setattr(step_trace, "FakeTensorMode", RealTensors)
    real = traced(config, tmp_path)
    assert planned.step_peak == pytest.approx(real.step_peak, rel=0.02)
    assert total(planned.work) == pytest.approx(total(real.work), rel=0.05)  # collating counts there, too
    assert total(planned.work, "moved") == pytest.approx(total(real.work, "moved"), rel=0.02)


def test_plan_of_deep_model_is_carried_on_from_two_depths(
    tiny_decoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": str(glosses), "columns": {"text": "text"}}
    tree = {"model": str(tiny_decoder), "task": "causal", "method": "lora", "data": data, "output_dir": str(tmp_path)}
    planner = Planner(RunConfig.build(tree, {}))
    planner.architecture.num_hidden_layers = 14
    carried, *works = planner._traced(planner.config)
    monkeypatch.setattr("graftwerk.training.planning.plan.DEPTHS", (7, 14))
    planner._known.clear()
    whole, work = planner._traced(planner.config)
    works.append(work)
    for name in ("weights", "trained", "kept", "alive", "evaluation_peak"):
        assert carried[name] == pytest.approx(whole[name], rel=0.01), name
    for what in (None, "operations", "moved"):
        assert total(works[0], what) == pytest.approx(total(works[1], what), rel=0.01), what


@pytest.mark.parametrize(("errors", "held"), [(0.0, 50 + 13 * 20), (100.0, 2000)])
def test_plan_of_deep_model_has_gaps_and_errors_that_grow_with_its_layers(
    errors: float, held: float, tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    """Gradients allocated between recomputed activations: the heap grows by layer, the tensors alive hardly do."""
    data = {"train": str(glosses), "columns": {"text": "text"}}
    tree = {"model": str(tiny_decoder), "task": "causal", "method": "lora", "data": data, "output_dir": str(tmp_path)}
    planner = Planner(RunConfig.build(tree, {}))
    planner.architecture.num_hidden_layers = 20

    def figures(_: Any, architecture: Any) -> tuple[dict[str, float], StepWork]:
        layers = architecture.num_hidden_layers
        peaks = {"step_peak": 70.0 + layers, "filling_peak": 0.0, "evaluation_peak": 0.0, "errors": errors * layers}
        alive = max(70.0 + layers, errors * layers)
        return {**peaks, "alive": alive, "held": max(alive, 50.0 + 13 * layers)}, StepWork({}, {}, 1, 1, 1)

    planner._figures = figures  # type: ignore[assignment,method-assign]
    assert planner._measured(planner.config)["held"] == held


def test_plan_of_deep_model_carries_on_step_and_evaluation_apart(
    tiny_decoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At few layers the evaluation of a 7B model takes the most, at 32 its steps do."""
    data = {"train": str(glosses), "columns": {"text": "text"}, "validation": 4}
    tree = {"model": str(tiny_decoder), "task": "causal", "method": "lora", "data": data, "output_dir": str(tmp_path)}
    planner = Planner(RunConfig.build(tree, {}))
    planner.architecture.num_hidden_layers = 32

    def figures(architecture: Any, filling: float) -> tuple[dict[str, float], StepWork]:
        step, evaluation = 10.0 + 5 * architecture.num_hidden_layers, 100.0 + architecture.num_hidden_layers
        alive = max(step, filling, evaluation)
        peaks = {"step_peak": step, "filling_peak": filling, "evaluation_peak": evaluation, "errors": 0.0}
        return {**peaks, "alive": alive, "held": 1.5 * alive}, StepWork({}, {}, 1, 1, 1)

    for filled, expected in ((0.0, (170, 255)), (200.0, (200, 300))):
        monkeypatch.setattr(planner, "_figures", lambda _, architecture, filled=filled: figures(architecture, filled))
        planner._known.clear()
        found = planner._measured(planner.config)
        assert (found["alive"], found["held"]) == expected


@given(SIZES)
def test_held_by_cuda_covers_what_is_alive_and_takes_free_blocks_again(sizes: list[int]) -> None:
    made = array("q", sizes)
    freed = array("q", [-number for number in range(1, len(sizes) + 1)])
    once = held_by_cuda(made)
    assert once >= sum(sizes)
    assert held_by_cuda(made + freed + made) == once
    assert held_by_cuda(freed[:0]) == 0


def test_held_by_cuda_follows_the_rules_of_torchs_allocator() -> None:
    mib = 1 << 20
    assert held_by_cuda(array("q", [1])) == 2 * mib
    assert held_by_cuda(array("q", [mib, mib])) == 2 * mib
    assert held_by_cuda(array("q", [mib + 1])) == 20 * mib
    assert held_by_cuda(array("q", [9 * mib, 9 * mib])) == 20 * mib
    assert held_by_cuda(array("q", [11 * mib])) == 12 * mib
    # both halves of a segment are joined when they are free
    assert held_by_cuda(array("q", [9 * mib, 9 * mib, -1, -2, 18 * mib])) == 20 * mib


def series(events: list[int], *trims: int, recorded: int = 1) -> Series:
    return Series(array("q", events), bytes([recorded]) * sum(event >= 0 for event in events), trims)


def test_held_by_libc_covers_what_is_alive() -> None:
    held = held_by_libc(series([1 << 20] * 20 + [-number for number in range(1, 21)] + [50 << 20]))
    assert held is not None
    assert 50 << 20 <= held <= 80 << 20


def test_held_by_libc_gives_back_what_is_free_before_an_evaluation() -> None:
    # a large block that is freed lets the next ones lie side by side; of those every other one is freed, in whose place
    # 24 MiB find no room
    events = [25 << 20, -1] + [1 << 20] * 40 + [-number for number in range(2, 42, 2)]
    kept, trimmed = (held_by_libc(series([*events, 24 << 20], *places)) for places in ((), (len(events),)))
    assert kept is not None
    assert trimmed is not None
    assert 43 << 20 <= trimmed < 50 << 20
    assert 63 << 20 <= kept < 70 << 20


def test_repeated_plays_the_step_again_with_numbers_of_its_own() -> None:
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(step_trace.StepTrace)), 0)
    events, evaluation = array("q", [100, 200, 10, 20, -3]), array("q", [30, -5])
    given = {"setup": 2, "loaded": 1, "events": events, "evaluation": evaluation, "recorded": bytes([0, 1, 0, 1, 1])}
    trace = step_trace.StepTrace(**{**numbers, **given})  # type: ignore[arg-type]
    whole, step = repeated(trace, 100, 100), [10, 20, -3, -4]
    events = list(whole.events)
    assert events[:10] == [0, 200, 10, 20, -3, -4, 10, 20, -5, -6]
    (evaluated,) = whole.trims
    assert events[evaluated : evaluated + 2] == [30, -(2 + 2 * STEPS + 1)]
    assert len(events) == evaluated + 2 + AFTERWARDS * len(step)
    assert whole.events[:evaluated] == repeated(trace, 100, None).events
    assert repeated(dataclasses.replace(trace, cached=1), 100, 100).trims == (2, evaluated)
    assert whole.recorded == bytes([0, 1] + [0, 1] * STEPS + [1] + [0, 1] * AFTERWARDS)
    short = repeated(trace, 2, 0)  # evaluated once, at its end
    assert list(short.events) == [*events[:10], 30, -7]
    alive, made = 0, 0
    for event in events:
        made += event >= 0
        alive += 1 if event >= 0 else -1
        assert -event <= made
    assert alive == 2


def test_held_by_libc_counts_small_blocks_of_autograd() -> None:
    bare, full = (held_by_libc(series([4096] * 2000, recorded=recorded)) for recorded in (0, 1))
    assert bare is not None
    assert full is not None
    assert 2000 * 4096 <= bare < full < 2000 * 4096 * 2


def test_calibration_takes_the_median_of_runs_and_leaves_out_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    assert calibration("cpu") == Calibration(PROCESS_BYTES, 1.0, 0)
    learn("cpu", -1.0, 1.0)
    learn("cpu", 40e6, 1000.0)
    assert calibration("cpu").runs == 0
    learn("cpu", 40e6, 3.0)
    learn("cpu", 30e6, 2.0)
    assert calibration("cpu") == Calibration(30e6, 2.0, 2)
    monkeypatch.setattr(calibrating, "LATEST", 2)
    learn("cpu", 50e6, 4.0)
    assert calibration("cpu") == Calibration(30e6, 2.0, 2)  # of the default and the latest two
    learn("cpu", 60e6, 5.0)
    assert calibration("cpu") == Calibration(50e6, 4.0, 2)
    (tmp_path / f"{NAME}.json").write_text('{"cpu": 3}')
    assert calibration("cpu").runs == 0


def work_of(operations: int = 0, moved: int = 0, times: float = 1, attention: bool = False) -> dict[Call, Work]:
    """Return the work of one operation that is not timed."""
    call = Call(f"{operations} {moved} {attention}", (), ())
    return {call: Work(times, operations, attention, moved)}


def test_seconds_of_a_step_scale_products_by_tokens_and_attention_by_squares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    batches = {**work_of(500), **work_of(20, attention=True, times=10), **work_of(moved=6, times=10)}
    traced = StepWork(batches, work_of(moved=5, times=3), tokens=50, squares=400, micro_batches=1)
    step, times = MeanStep(tokens=100, squares=1000, batches=2), CallTimes(Speeds(10, 30, 0.1), "cpu")
    products = (500 * 2 / LINEAR_SPEED + 200 * 2.5 / ATTENTION_SPEED) / 10
    expected = products + (60 * 2 + 15) / MOVED_SPEED / 30 + (STEP + 2 * 21 + 3) * CALL * 0.1
    assert step.seconds(traced, times) == pytest.approx(expected)


def test_seconds_of_a_call_are_those_of_the_operation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speeds would make each of them a thousand seconds."""
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # a second for each of the calls
    speeds, meter = Speeds(1e5, 1e5, 1e-6), Meter()
    with FakeTensorMode(), meter:
        x, weight = torch.ones(200, 384), torch.ones(384, 384)
        y = torch.addmm(weight[0], x, weight.t())
        torch.nn.functional.gelu(y)
        torch.nn.functional.embedding(torch.zeros(4, 50, dtype=torch.long), weight)
        torch.native_dropout(y, 0.1, True)
        y[:, :3].add_(1.0)
    state = torch.get_rng_state()
    monkeypatch.setattr(call_times, "MOST_SECONDS", 1e6)
    monkeypatch.setattr(call_times, "BUDGET", 1e6)
    times = CallTimes(speeds, "cpu")
    times.learn(meter.work)

    def by(times: CallTimes) -> dict[str, float]:
        return {str(call.operation): times.seconds(call, work) for call, work in meter.work.items()}

    found, by_speed = by(times), {str(call.operation): speeds.seconds(work) for call, work in meter.work.items()}
    assert {found[f"aten.{name}.default"] for name in ("addmm", "gelu", "embedding", "native_dropout")} == {IN_STEP}
    assert found["aten.add_.Tensor"] == by_speed["aten.add_.Tensor"], "too little to be timed"
    assert torch.equal(state, torch.get_rng_state()), "dropout draws no numbers of the training"
    monkeypatch.setattr(call_times, "_alone", None)
    again = CallTimes(speeds, "cpu")
    again.learn(meter.work)
    assert by(again) == found
    for name, value in (("MOST_SECONDS", 0.0), ("MOST_BYTES", 0)):
        with monkeypatch.context() as patched:
            patched.setattr(call_times, name, value)
            assert by(again) == by_speed
    again.kind = "cuda"
    assert by(again) == by_speed
    (tmp_path / f"{call_times.NAME}.json").write_text('{"damaged')
    assert by(CallTimes(speeds, "cpu")) == by_speed


def test_times_of_calls_are_the_shortest_of_several_rounds_within_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    speeds, seconds, warmed = Speeds(1e9, 1e9, 1e-6), iter((0.003, 0.002, 0.005)), list[bool]()

    def alone(call: Call, warm: bool) -> float:
        warmed.append(warm)
        return next(seconds)

    monkeypatch.setattr(call_times, "_alone", alone)
    call, work = Call(torch.ops.aten.mm.default, (2,), ()), Work(1, 10**7, False, 0)
    times = CallTimes(speeds, "cpu")
    times.learn({call: work})
    assert times.seconds(call, work) == IN_STEP * 0.002
    assert warmed == [True, False, False]
    more, large = Call(torch.ops.aten.mm.default, (3,), ()), replace(work, operations=10**8)
    seconds = iter((0.5, 0.007, 0.007, 0.007))
    CallTimes(speeds, "cpu").learn({call: work, Call(torch.ops.aten.mm.default, (4,), ()): work, more: large})
    assert CallTimes(speeds, "cpu").seconds(more, large) == IN_STEP * 0.5, "the largest first, and once if it is long"
    monkeypatch.setattr(call_times, "KEPT", 2)
    monkeypatch.setattr(call_times, "BUDGET", -1.0)
    late = Call(torch.ops.aten.mm.default, (5,), ())
    times.learn({late: work})
    assert times.seconds(late, work) == speeds.seconds(work)
    monkeypatch.setattr(call_times, "BUDGET", 9.0)
    seconds = iter((0.001, 0.001, 0.001))
    CallTimes(speeds, "cpu").learn({late: work})
    kept = CallTimes(speeds, "cpu")
    assert [kept.seconds(one, work) == speeds.seconds(work) for one in (call, late)] == [True, False], "oldest go"
    names = [call_times._name(one) for one in (call, late, more)]
    kept_file = {kept._key: dict(zip(names, (0.0, "x", None), strict=True))}
    (tmp_path / f"{call_times.NAME}.json").write_text(json.dumps(kept_file))
    assert CallTimes(speeds, "cpu")._known == {names[2]: None}


def test_alone_takes_the_shortest_call_and_stops_after_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[Any]()
    call = Call(lambda *given, **named: calls.append((given, named)), (3,), (("a", 4),))
    for took, wanted, made in ((0.004, 0.002, 4), (1.0, 1.0, 2)):
        clock = iter((0.0, took, 5.0, 5.002, 6.0, 6.003))
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
        assert call_times._alone(call, warm=True) == pytest.approx(wanted)
        assert calls == [((3,), {"a": 4})] * made
        calls.clear()


def test_operands_are_made_as_they_were() -> None:
    like = [
        torch.ones(3, 4).t(), torch.ones(1, 4).expand(3, 4), torch.ones(()), torch.ones(0, 2),
        torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(5, dtype=torch.int8), torch.ones(2, dtype=torch.bool),
    ]  # fmt: skip
    call = Call.of(torch.ops.aten.cat.default, [like, 1.5], {"out": like[0]})
    made, number = call_times._made(call.given)
    for one, other in zip([*made, call_times._made(call.named[0][1])], [*like, like[0]], strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert bool((one == (0.5 if one.dtype.is_floating_point else 0)).all())
    assert number == 1.5
    rates = [call_times._name(Call(torch.ops.aten.mul.Tensor, (call.given[0], rate), ())) for rate in (1e-3, 1e-4)]
    assert rates[0] == rates[1], "a rate does not decide how long an operation takes"
    assert call_times._name(Call(torch.ops.aten.mul.Tensor, (call.given[0], 2), ())) != rates[0]


def test_optimizer_of_deep_model_grows_by_what_it_moves() -> None:
    low, high = (StepWork({}, work_of(moved=moved, times=2), 1, 1, 1) for moved in (100, 180))
    (work,) = low.carried_on(high, 7.0).update.values()
    assert work.times * work.moved == 2 * (100 + 7 * 80)
    assert low.carried_on(low, 7.0).update == low.update


def test_call_that_needs_values_is_worked_out_from_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    losses = torch.ops.aten.nll_loss_forward.default
    rows = Operand((40_000, 2), (2, 1), torch.float32)
    call = Call(losses, (rows, Operand((3,), (1,), torch.int64), None, 1, -100), ())  # three targets for all rows
    speeds, work = Speeds(1e9, 1e9, 1e-6), Work(1, 0, False, 320_000)
    times = CallTimes(speeds, "cpu")
    times.learn({call: work})
    assert times.seconds(call, work) == speeds.seconds(work)


@pytest.mark.parametrize(("asked", "wanted"), [(2, 4), (None, 1)])
def test_planner_reads_speeds_of_the_threads_that_a_training_has(
    asked: int | None, wanted: int, tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan from within a training has its threads already."""
    data, method = {"train": str(glosses)}, "lora"
    tree = {"model": str(tiny_encoder), "method": method, "data": data, "output_dir": str(tmp_path / "run")}
    seen, before = list[int](), torch.get_num_threads()
    monkeypatch.setattr(hardware, "threads_wanted", lambda: 4)
    monkeypatch.setattr(planning, "_num_processes", lambda config: 4)
    monkeypatch.setattr(planning, "calibration", lambda kind: seen.append(torch.get_num_threads()))
    torch.set_num_threads(4)
    try:
        Planner(RunConfig.build(tree), num_processes=asked)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [wanted]


def test_speeds_are_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))
    call_times._probed.cache_clear()
    found = speeds_of(torch.float32, "cpu")
    assert found.operations > 1e8
    assert found.bytes > 1e7
    assert 1e-8 < found.call_seconds < 1e-3
    monkeypatch.setattr(call_times, "shortest_seconds", None)
    call_times._probed.cache_clear()
    assert speeds_of(torch.float32, "cpu") == found
    (tmp_path / "speeds.json").write_text('{"damaged')
    call_times._probed.cache_clear()
    with pytest.raises(TypeError):
        speeds_of(torch.float32, "cpu")


@pytest.mark.parametrize(("micro", "processes", "batches"), [(4, 1, 1), (2, 1, 2), (2, 2, 1)])
def test_mean_step_counts_tokens_squares_and_micro_batches_of_one_process(
    micro: int, processes: int, batches: int
) -> None:
    rows = [Example({"input_ids": [7] * 3}, 0)] * 12
    training = TrainingSettings(per_device_train_batch_size=micro * processes, gradient_accumulation_steps=batches)
    mean = mean_step(rows, training, micro, processes, torch.float32)
    own = micro * batches
    assert mean == MeanStep(tokens=3.0 * own, squares=9.0 * own, batches=batches)


@pytest.mark.parametrize(
    ("settings", "family"),
    [("nf4", "llama"), ({"name": "nf4", "double_quant": False}, "llama"), ("int8", "llama"), ("nf4", "gpt2")],
)
def test_quantized_layers_without_values_take_the_bytes_of_real_ones(
    settings: Any, family: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from graftwerk.modeling.quantize import quantizer

    chosen = Quantization.model_validate(settings)
    config: Any = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, mlp_bias=True
    )
    made_of, path = LlamaForCausalLM, "model.layers.0.mlp.up_proj"
    if family == "gpt2":  # whose layers store their weights transposed
        config = GPT2Config(vocab_size=96, n_embd=64, n_inner=320, n_layer=1, n_head=4)
        made_of, path = GPT2LMHeadModel, "transformer.h.0.mlp.c_fc"
    made_of(config).save_pretrained(tmp_path / "model")
    made = quantizer(chosen.name, double_quant=bool(chosen.double_quant), compute=torch.float32)
    real = made_of.from_pretrained(tmp_path / "model", quantization_config=made, device_map={"": torch.device("cpu")})
    fake = FakeTensorMode()
    with fake:
        planned = made_of._from_config(config)
        stored = quantize(planned, chosen, torch.float32, ())
    codes = [layer.weight for layer in real.modules() if isinstance(layer, nn.Linear) and is_quantized(layer.weight)]
    states = [weight.quant_state for weight in codes] if chosen.name == "nf4" else []
    scales = [state.absmax for state in states] + [state.state2.absmax for state in states if state.nested]
    scales += [weight.SCB for weight in codes if chosen.name == "int8"]
    assert sorted(tensor.nbytes for tensor in stored) == sorted(tensor.nbytes for tensor in (*codes, *scales))

    x, least = torch.randn(3, 7, 64, requires_grad=True), 1024
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        real.get_submodule(path)(x).square().sum().backward()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    same = fake.from_tensor(x.detach()).requires_grad_()
    with fake, Meter() as meter:
        for tensor in (same, *planned.parameters(), *stored):
            meter.add(tensor)
        before = len(meter.events)
        planned.get_submodule(path)(same).square().sum().backward()
    found = sorted(size for size in meter.events[before:] if size >= least)
    assert found == sorted(size for size in events if size >= least)
    assert meter.operations == 2 * 2 * 3 * 7 * 64 * 320  # forward, and backward through the frozen weight


@pytest.mark.parametrize(
    ("capacity", "kept"),
    [(None, 1024), ("2", 2), ("+3", 3), (" 16 entries", 16), ("many", 0), ("-5", 0), ("", 1024)],
)
def test_products_held_respects_the_capacity_of_onednns_cache(
    capacity: str | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capacity is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", capacity)
    assert [products_held(products) for products in (1, 5000)] == [min(1, kept) * PRODUCT, kept * PRODUCT]


def test_plan_counts_16_bit_products_of_each_shape_of_a_batch(
    tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[step_trace.StepTrace] = []

    def trace(*given: Any, **types: Any) -> step_trace.StepTrace:
        traces.append(step_trace.trace_step(*given, **types))
        return traces[-1]

    monkeypatch.setattr(planning, "trace_step", trace)
    monkeypatch.setattr(planning, "held_by_libc", lambda *_: 0)
    beside = {}
    for compute, steps in (("float32", 9), ("bfloat16", 9), ("bfloat16", 1)):
        tree = {
            "model": str(tiny_encoder), "task": "classification", "method": "lora",
            "data": {"train": str(glosses), "validation": 10}, "output_dir": str(tmp_path / "run"),
            "training": {
                "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": steps,
                "compute_type": compute,
            },
        }  # fmt: skip
        planner = Planner(RunConfig.build(tree), num_processes=1)
        beside[compute, steps] = planner._measured(planner.config)["beside"]
    assert traces[0].products == traces[0].evaluated_products == beside["float32", 9] == 0
    examples, training = planner.prepared.examples, planner.config.training
    exact, shapes = (
        shapes_of(examples["train"], training, 4, 1, 9, getattr(torch, each)) for each in ("float32", "bfloat16")
    )
    held_out = evaluated_shapes(examples["validation"], 4, torch.bfloat16)
    assert 1 < shapes < exact <= 9, "in 16 bits lengths are padded to fewer"
    once, evaluated = traces[1].products, held_out * traces[1].evaluated_products
    fixed = traces[1].fixed_products  # of the head and of the first token, the same for all lengths
    assert once > evaluated / held_out > 0 < fixed
    assert beside["bfloat16", 9] == PRODUCT * min(1024, once * shapes + evaluated + fixed)
    assert beside["bfloat16", 1] == PRODUCT * (once + evaluated + fixed)


def test_products_of_virtual_tokens_and_targets_depend_on_the_length() -> None:
    """16 rows of 65 tokens with 10 virtual ones, and targets of 7 tokens; a head reads one token of each row."""
    shapes = {"prompt": (16 * 75, 384), "text": (16 * 65, 384), "target": (16 * 7, 384), "one": (16, 384)}
    products = {name: ("mm", (shape, (384, 1)), ((384, 8), (8, 1))) for name, shape in shapes.items()}
    batch = {"input_ids": torch.zeros(16, 65), "labels": torch.zeros(16, 7)}
    by_length = step_trace._by_length({*products.values()}, [batch])
    assert {name for name, product in products.items() if product in by_length} == {"prompt", "text", "target"}


def paths(values: Tensor, weight: Tensor) -> Tensor:
    first = values.sin()
    hidden = first + torch.tanh(first @ weight)  # its gradient goes two ways, and is summed from three
    second = values.cos()
    twice = (second + 1) + (second + 2)  # the same gradient for both: their sum takes a tensor
    return (hidden * 2).sum() + (hidden.view(-1) * 3).sum() + (hidden * hidden).mean() + twice.tanh().sum()


def shared(values: Tensor, weight: Tensor) -> Tensor:
    hidden, other = values.sin(), weight.cos()
    return (hidden + other).square().sum() + hidden.exp().sum()  # the gradient that comes first is the other's too


def transposed(values: Tensor, weight: Tensor) -> Tensor:
    hidden = values.sin()
    return (hidden @ weight + hidden.t() @ weight).square().sum()


def recomputed(values: Tensor, weight: Tensor) -> Tensor:
    def layer(hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(hidden @ weight)

    hidden: Tensor = checkpoint(layer, values.sin(), use_reentrant=True, preserve_rng_state=False)
    return hidden.square().sum()


def attended(values: Tensor, weight: Tensor) -> Tensor:
    query, key = values.view(1, 2, 32, 64), weight.view(1, 2, 32, 64)
    scores = nn.functional.scaled_dot_product_attention(
        query, key, key, attn_mask=torch.zeros(1, 1, 32, 32), dropout_p=0.5
    )
    return (scores + values.view(1, 2, 32, 64)).square().sum()  # a sum that is not in place, in the same function


@pytest.mark.parametrize("loss_of", [paths, shared, transposed, recomputed, attended])
def test_meter_counts_the_tensors_that_are_made_without_a_mode(loss_of: Any) -> None:
    tensors, least = [torch.randn(64, 64, requires_grad=True) for _ in range(2)], 2048
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_of(*tensors).backward()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    fake = FakeTensorMode()
    shapes = [fake.from_tensor(tensor.detach()).requires_grad_() for tensor in tensors]
    with fake, Meter() as meter:
        for tensor in shapes:
            meter.add(tensor)
        before = len(meter.events)
        loss_of(*shapes).backward()
    traced = sorted(size for size in meter.events[before:] if size >= least)
    assert traced == sorted(size for size in events if size >= least)
    assert traced


def test_trace_builds_masks_only_for_rows_of_several_lengths(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    before, seen = AttentionMaskInterface()["sdpa"], list[bool]()

    def watched(*given: Any, **more: Any) -> Any:
        seen.append(more["attention_mask"] is None)
        return before(*given, **more)

    AttentionMaskInterface.register("sdpa", watched)
    try:
        for name, rows in (("alike", ["one two three four"] * 8), ("unlike", ["one two three four"] * 7 + ["one"])):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
            tree = {
                "model": str(tiny_decoder), "task": "causal", "method": "lora", "output_dir": str(tmp_path / name),
                "data": {"train": str(path), "columns": {"text": "text"}, "validation": None},
                "training": {"per_device_train_batch_size": 4},
            }  # fmt: skip
            traced(RunConfig.build(tree, {}), tmp_path)
            assert AttentionMaskInterface()["sdpa"] is watched
            assert set(seen) == {name == "alike"}
            seen.clear()
        with pytest.raises(KeyError), without_masks(True):
            raise KeyError
        assert AttentionMaskInterface()["sdpa"] is watched
    finally:
        AttentionMaskInterface.register("sdpa", before)
