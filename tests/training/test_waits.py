"""At most one wait for the device a step, none in inference, and the next step's batch ready before it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graftwerk import activate, attach
from graftwerk.evaluation.inference import moved
from graftwerk.methods.registry import parse_method
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.summarization import Summarization
from graftwerk.training import optim
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event
from graftwerk.training.gradients import Gradient
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.step_batches import StepBatches
from graftwerk.training.trainer import Trainer
from graftwerk.training.trainer_inputs import RunContext, TrainingData
from tests.contract.cases import METHODS, REFUSED
from tests.families import ALL
from tests.training.host_syncs import Waits, counting

TASKS: dict[str, tuple[Task, str]] = {
    "classification": (Classification(), "bert"),
    "causal": (Causal(), "llama"),
    "seq2seq": (Summarization(), "t5"),
    "masked": (Masked(), "bert"),
}
FAST = ("lora", "lora tokens", "prefix", "prompt")
"""Methods that the fast tests try; the others wait in no other places."""
MIXED = ("lora", "dora", "houlsby", "ia3", "prefix", "prompt")


class Words(SimpleNamespace):
    """Of a tokenizer what collating needs."""

    pad_token_id = pad_token_type_id = 0
    mask_token_id, unk_token_id = 3, None
    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 64


def examples(kind: str, count: int = 16) -> list[Example]:
    draw, made = random.Random(0), []
    for number in range(count):
        ids = [1, *(draw.randrange(4, 64) for _ in range(draw.randint(3, 8))), 2]
        target: Any = list(ids)
        if kind == "classification":
            target = number % 3
        elif kind == "seq2seq":
            target = [*(draw.randrange(4, 64) for _ in range(draw.randint(2, 5))), 2]
        elif kind == "masked":
            target = [-100, ids[1], *[-100] * (len(ids) - 2)]
        made.append(Example({"input_ids": ids}, target))
    return made


def method_with(name: str, dropout: float) -> Any:
    settings = dict(METHODS[name])
    if dropout and "lora_dropout" in type(parse_method(settings)).model_fields:
        settings["lora_dropout"] = dropout
    return parse_method(settings)


def trainer_of(folder: Path, kind: str, method: str = "lora", *, dropout: float = 0.0, **kwargs: Any) -> Trainer:
    task, family = TASKS[kind]
    model = ALL[family].build(classifier=kind == "classification", dropout=dropout)
    torch.manual_seed(0)
    run = RunContext(Checkpoints(folder), kwargs.pop("emit", lambda event: None))
    labels = kwargs.pop("labels", ())
    usual = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    return Trainer(
        attach(model, method_with(method, dropout)),
        task.for_model(model.config),
        Words(),  # type: ignore[arg-type]
        TrainingData(examples(kind), labels=labels),
        TrainingSettings(**(usual | {"trunk_cache": False} | kwargs)),
        run,
    )


def of_device(trainer: Trainer) -> list[Tensor]:
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    return [*trainer.adapter.model.parameters(), *trainer.adapter.model.buffers(), *moments]


def waits_in_a_step(folder: Path, kind: str, method: str, *, mixed: bool = False, **kwargs: Any) -> Counter[str]:
    """Return our waits of the third step, callbacks included."""
    waits, after = Waits(), {}

    def listen(event: Event) -> None:
        if event.kind == "step":
            after[event.step] = waits.found.copy()

    trainer = trainer_of(folder, kind, method, emit=listen, **kwargs)
    if mixed:
        adapter = trainer.adapter
        attach(adapter.model, adapter.method, "other")
        activate(adapter.model, rows=["default", "other", None, "default"])
    with counting(of_device(trainer), waits):
        trainer.fit()
    return waits.of("graftwerk", after[3] - after[2])


def cells(methods: Any) -> list[Any]:
    return [
        pytest.param(kind, method, id=f"{method}-{kind}", marks=() if method in FAST else pytest.mark.slow)
        for method in methods
        for kind, (_, family) in TASKS.items()
        if kind != "masked" and (method, family) not in REFUSED and (method != "probe" or kind == "classification")
    ]


# -- waits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), cells(METHODS))
def test_training_step_with_dropout_and_two_micro_batches_waits_once(tmp_path: Path, kind: str, method: str) -> None:
    waits = waits_in_a_step(
        tmp_path, kind, method, dropout=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert sum(waits.values()) == 1, waits


def test_training_step_with_class_weights_waits_once(tmp_path: Path) -> None:
    waits = waits_in_a_step(
        tmp_path, "classification", "lora", class_weights={"a": 2.0, "b": 0.5}, labels=("a", "b", "c")
    )
    assert sum(waits.values()) == 1, waits


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", MIXED)
def test_training_step_of_mixed_rows_waits_once(tmp_path: Path, method: str, dropout: float) -> None:
    waits = waits_in_a_step(tmp_path, "causal", method, mixed=True, dropout=dropout)
    assert sum(waits.values()) == 1, waits


@pytest.mark.parametrize("kind", ["classification", "causal", "seq2seq"])
@pytest.mark.parametrize("method", MIXED)
def test_mixed_rows_in_inference_wait_never(method: str, kind: str) -> None:
    family = ALL[TASKS[kind][1]]
    model = family.build(classifier=kind == "classification")
    for name in ("one", "other"):
        attach(model, method_with(method, 0.0), name)
    batch = family.batch(rows=4)
    with counting([*model.parameters(), *model.buffers(), *batch.values()]) as waits, torch.inference_mode():
        activate(model, rows=["one", "other", None, "one"])
        model(**batch)  # the first pass too: nothing is left for it to move
        model(**batch)
    assert not waits.of("graftwerk")


@pytest.mark.parametrize(
    ("wait", "kind"),
    [
        (lambda x: x[0].item(), "read"),
        (lambda x: bool((x > 0).all()), "read"),
        (lambda x: x.cpu(), "read"),
        (lambda x: x.tolist(), "read"),
        (lambda x: torch.zeros(3).copy_(x), "read"),
        (lambda x: x[x > 0], "shape"),
        (lambda x: x.nonzero(), "shape"),
        (lambda x: x.unique(), "shape"),
        (lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long).to(x.device, non_blocking=True)), "shape"),
        (lambda x: torch.ones(3).to(x.device), "copy"),
        (lambda x: torch.tensor([1.0], device=x.device), "copy"),
        (lambda x: x.new_tensor([1.0]), "copy"),
        (lambda x: x.copy_(torch.ones(3)), "copy"),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True) + x, None),
        (lambda x: torch.full((3,), 2.0, device=x.device) + x, None),
        (lambda x: x[torch.arange(2, device=x.device)] * 2.0, None),
        (lambda x: torch.ones(3).nonzero().tolist(), None),
        (lambda x: torch.ones(3).to(x.device).cpu().tolist(), "copy+read"),
    ],
)
def test_counting_finds_each_kind_of_wait(wait: Any, kind: str | None) -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    with counting([x]) as waits:
        wait(x)
    assert "+".join(sorted(kind for _, kind, _ in waits.found.elements())) == (kind or "")


# -- the optimizer, launched before the wait --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_step_if_not_finite_changes_nothing(tmp_path: Path, fused: bool) -> None:
    trainer = trainer_of(tmp_path, "classification")
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["fused"] = fused

    own = [*trainer.parameters, *optim.optimizer_tensors(optimizer).values()]

    def state() -> list[Tensor]:
        return [tensor.detach().clone() for tensor in own]

    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    for parameter in trainer.parameters:
        parameter.grad = torch.randn_like(parameter)
    before = state()
    optimizer.step()
    stepped = state()
    with torch.no_grad():
        for tensor, old in zip(own, before, strict=True):
            tensor.copy_(old)
    optim.step_if(optimizer, torch.tensor(True))
    assert same(state(), stepped)
    assert not same(stepped, before)
    for parameter in trainer.parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optim.step_if(optimizer, torch.tensor(False))
    assert same(state(), stepped)
    assert not hasattr(optimizer, "found_inf")


def test_step_launches_optimizer_and_next_batch_before_it_waits(tmp_path: Path, monkeypatch: Any) -> None:
    order: list[str] = []

    def noted(owner: Any, name: str, said: str) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (order.append(said), own(*args, **kwargs))[1])

    noted(optim, "step_if", "optimizer")
    noted(StepBatches, "prepare", "collate")
    noted(Gradient, "read", "wait")
    trainer_of(tmp_path, "causal", max_steps=2).fit()
    assert order == ["collate", "optimizer", "collate", "wait", "optimizer", "wait"]


# -- the next step's batch --------------------------------------------------------------------------------------------


def weights_after(trainer: Trainer) -> list[Tensor]:
    trainer.fit()
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_prefetch_changes_no_bit(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    ahead = weights_after(trainer_of(tmp_path / "a", kind, dropout=0.1, max_steps=6))
    monkeypatch.setattr(StepBatches, "prefetch", lambda *_: None)
    plain = weights_after(trainer_of(tmp_path / "b", kind, dropout=0.1, max_steps=6))
    assert all(torch.equal(a, b) for a, b in zip(ahead, plain, strict=True))


def test_resume_with_batches_that_are_drawn_is_exact(tmp_path: Path) -> None:
    """A checkpoint lies between a batch that was drawn ahead and the step that it is for."""
    settings = {"dropout": 0.1, "max_steps": 6, "save_steps": 3}
    whole = weights_after(trainer_of(tmp_path / "a", "masked", **settings))
    resumed = trainer_of(tmp_path / "a", "masked", **settings)
    resumed.restore(resumed.checkpoints.load(3))
    assert all(torch.equal(a, b) for a, b in zip(whole, weights_after(resumed), strict=True))


def test_prefetched_batch_is_dropped_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    settings = {"dropout": 0.1, "max_steps": 6, "save_steps": 3}
    trainer = trainer_of(tmp_path, "masked", **settings)
    whole = weights_after(trainer)
    again = trainer_of(tmp_path / "b", "masked", **settings)
    again.gradients.batches.prefetch(again.batch_sampler(3), again.state.micro_batch)  # drawn from another state
    again.restore(trainer.checkpoints.load(3))
    assert all(torch.equal(a, b) for a, b in zip(whole, weights_after(again), strict=True))


def test_moved_to_cuda_copies_pinned_tensors_without_blocking() -> None:
    calls: list[Any] = []

    class Fake(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.pin_memory:
                calls.append("pin")
                return args[0]
            if func is Tensor.to:
                calls.append((args[1].type, kwargs))
                return args[0]
            return func(*args, **(kwargs or {}))

    with Fake():
        moved({"input_ids": torch.ones(2, 2)}, torch.device("cuda", 0))
    assert calls == ["pin", ("cuda", {"non_blocking": True})]
    assert isinstance(moved({"input_ids": torch.ones(1)}, torch.device("cpu")), dict)
