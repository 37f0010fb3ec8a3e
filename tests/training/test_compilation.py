"""`training.compile`: the layers as graphs, the same losses, and a reason where that cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from graftwerk.errors import ConfigError, ResourceError, UnsupportedError
from graftwerk.kernels import flags
from graftwerk.methods.dropout import InputDropout
from graftwerk.modeling.architectures import Architecture
from graftwerk.training import compilation
from graftwerk.training.events import Event
from graftwerk.training.num_processes import check_processes
from graftwerk.training.resume_check import differences
from graftwerk.training.trainer import Trainer
from tests.families import ALL
from tests.modeling.test_compile import SHALLOW, Counting
from tests.training.test_waits import trainer_of

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one layer: each layer is traced, and takes its time."""
    for name, family in SHALLOW.items():
        monkeypatch.setitem(ALL, name, family)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    torch._dynamo.reset()
    backend = Counting()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def losses(trainer: Trainer) -> list[float]:
    said: list[Event] = []
    trainer.emit = said.append
    trainer.fit()
    assert not [event for event in said if event.kind == "warning"]
    return [event.values["loss"] for event in said if event.kind == "step"]


def native_dropout(self: InputDropout, x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.dropout(x.to(dtype), self.p) if self.p else x.to(dtype)


@pytest.mark.parametrize(
    ("kind", "method", "graphs", "settings"),
    [
        ("classification", "lora", 1, {}),
        ("causal", "lora", 1, {"gradient_accumulation_steps": 2}),
        pytest.param("causal", "prefix", 1, {}, marks=pytest.mark.slow),
        pytest.param("causal", "prompt", 1, {}, marks=pytest.mark.slow),
        ("causal", "lora", 1, {"gradient_checkpointing": True, "dropout": 0.0}),
        pytest.param("causal", "lora", 1, {"packing": True}, marks=pytest.mark.slow),
        pytest.param("seq2seq", "lora", 2, {}, marks=pytest.mark.slow),
        pytest.param("masked", "dora", 1, {}, marks=pytest.mark.slow),
        *(
            pytest.param(kind, method, 1, {"gradient_checkpointing": True, "dropout": 0.0}, marks=pytest.mark.slow)
            for kind, method in (("classification", "houlsby"), ("causal", "ia3"), ("causal", "prefix"))
        ),
    ],
)
def test_trainer_compile_is_a_graph_a_stack_and_equals_eager(
    kind: str,
    method: str,
    graphs: int,
    settings: dict[str, Any],
    counting: Counting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For batches of all lengths, with dropout, and with the loss in tiles."""
    settings = {"dropout": 0.2, **settings}
    compiled = losses(trainer_of(tmp_path / "compiled", kind, method, compile=True, **settings))
    assert counting.graphs == graphs
    monkeypatch.setattr(InputDropout, "dropped", native_dropout)  # as graphs draw their masks
    with flags.plain("fused"):
        assert compiled == pytest.approx(losses(trainer_of(tmp_path / "eager", kind, method, **settings)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "graphs"),
    [
        ("causal", "lora", 1),
        ("classification", "houlsby", 1),
        ("causal", "ia3", 1),
        ("causal", "prefix", 1),
        ("causal", "prompt", 1),
        ("causal", "lora tokens", 1),
        ("seq2seq", "dora", 2),
        ("classification", "bitfit", 1),
        ("classification", "full", 1),
    ],
)
def test_compile_with_gradient_checkpointing_and_dropout_is_a_graph_a_stack_and_equals_eager(
    kind: str, method: str, graphs: int, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler, which repeats the masks of dropout in backward; graphs that run as they are draw new ones."""
    counting.compiler = aot_eager
    settings = {"dropout": 0.2, "gradient_checkpointing": True}
    compiled = losses(trainer_of(tmp_path / "compiled", kind, method, compile=True, **settings))
    assert counting.graphs == graphs
    monkeypatch.setattr(InputDropout, "dropped", native_dropout)
    with flags.plain("fused"):
        assert compiled == pytest.approx(losses(trainer_of(tmp_path / "eager", kind, method, **settings)), rel=1e-4)


def resumed_and_whole(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = {"dropout": 0.2, "save_steps": 1, "compile": True, **settings}
    whole = trainer_of(folder / "whole", "classification", **settings)
    whole.fit()

    def stop(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == 2:
            raise KeyboardInterrupt

    first = trainer_of(folder / "resumed", "classification", emit=stop, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    torch._dynamo.reset()
    second = trainer_of(folder / "resumed", "classification", **settings)
    snapshot = second.checkpoints.load_latest()
    assert snapshot is not None
    assert snapshot.step == 2
    second.restore(snapshot)
    second.fit()
    return whole.checkpoints.load(3).weights, second.checkpoints.load(3).weights


@pytest.mark.slow
def test_compiled_run_resumed_is_bit_equal(counting: Counting, tmp_path: Path) -> None:
    whole, resumed = resumed_and_whole(tmp_path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert counting.graphs == 3


@pytest.mark.slow
@pytest.mark.skipif(
    compilation._missing_compiler(torch.device("cpu")) is not None, reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("kind", ["classification", "causal", "seq2seq"])
def test_inductor_equals_eager_and_resumes_bit_equal(kind: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = losses(trainer_of(tmp_path / "compiled", kind, compile=True))
    assert compiled == pytest.approx(losses(trainer_of(tmp_path / "eager", kind)), rel=1e-4)
    if kind == "classification":
        whole, resumed = resumed_and_whole(tmp_path)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.skipif(
    compilation._missing_compiler(torch.device("cpu")) is not None, reason="inductor needs a C++ compiler"
)
def test_inductor_repeats_masks_of_dropout_under_gradient_checkpointing(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        torch._dynamo.reset()
        trainer = trainer_of(tmp_path / str(on), "classification", compile=True, dropout=0.2, gradient_checkpointing=on)
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class Tiny(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.layer, self.breaks = nn.Linear(2, 2), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.layer(x)


@pytest.fixture
def tiny_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(stacks=(SimpleNamespace(path=""),))
    monkeypatch.setattr(compilation, "read_architecture", lambda model: found)


@pytest.mark.usefixtures("tiny_stacks")
def test_compiled_stack_is_eager_outside_of_a_pass(counting: Counting) -> None:
    model, said = Tiny(), []
    compiled = compilation.CompiledStacks(model, torch.device("cpu"), said.append)
    with compiled.active():
        model(torch.ones(3, 2))
    model(torch.ones(4, 2))
    assert counting.graphs == 1
    assert model._compiled_call_impl is None
    assert [event.kind for event in said] == ["phase"]


@pytest.mark.usefixtures("tiny_stacks")
def test_broken_graph_warns_with_count_and_reason(counting: Counting) -> None:
    model, said = Tiny(breaks=True), []
    compiled = compilation.CompiledStacks(model, torch.device("cpu"), said.append)
    for rows in (3, 4):
        with compiled.active():
            model(torch.ones(rows, 2))
    (warning,) = [event.values for event in said if event.kind == "warning"]
    assert re.search(r"at [1-9] places .*graph_break", warning["text"])
    assert "training.compile=false" in warning["hint"]


@pytest.mark.usefixtures("tiny_stacks")
def test_failing_compiler_raises_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise NotImplementedError("no such operation")

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    model = Tiny()
    compiled = compilation.CompiledStacks(model, torch.device("cpu"), lambda event: None)
    with pytest.raises(UnsupportedError, match="NotImplementedError: no such operation") as caught, compiled.active():
        model(torch.ones(3, 2))
    assert caught.value.where == "training.compile"
    assert model._compiled_call_impl is None


def test_check_compile_without_compiler_or_known_layers_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "_missing_compiler", lambda device: "a C++ compiler")
    with pytest.raises(ResourceError, match=r"needs a C\+\+ compiler"):
        trainer_of(tmp_path, "classification", compile=True)
    monkeypatch.setattr(compilation, "is_dispatched", lambda model: True)
    with pytest.raises(UnsupportedError, match="spread over devices"):
        trainer_of(tmp_path, "classification", compile=True)
    monkeypatch.undo()
    monkeypatch.setattr(compilation, "read_architecture", lambda model: Architecture("other", False, (), (), (), ()))
    with pytest.raises(UnsupportedError, match="not known"):
        trainer_of(tmp_path, "classification", compile=True)


def test_compile_turns_trunk_cache_off_or_is_refused_with_it(counting: Counting, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"training\.compile runs all layers"):
        trainer_of(tmp_path, "classification", compile=True, trunk_cache=True).fit()


def test_compile_with_processes_raises(run_file: Any) -> None:
    from graftwerk.config import RunConfig

    tree = run_file(compile=True, processes=2)
    with pytest.raises(ConfigError, match="forked process"):
        check_processes(RunConfig.model_validate(tree))


def test_resume_of_run_before_compile_existed_is_no_difference() -> None:
    assert not differences({"config": {"training": {}}}, {"config": {"training": {"compile": False}}})
    assert differences({"config": {"training": {}}}, {"config": {"training": {"compile": True}}})
