"""The loop: the same step however it is cut up, and what it does when something is not as it should be."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from graftwerk.errors import ConfigError, DivergedError, MemoryShortage, UnsupportedError
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import attach
from graftwerk.tasks.base import Example
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.objective import ClassObjective, Objective
from graftwerk.tasks.predictions import ClassPredictions
from graftwerk.training.batch_sampler import micro_batches
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.snapshot import load_best_state
from graftwerk.training.trainer import Trainer
from graftwerk.training.trainer_inputs import RunContext, TrainingData


class Bench:
    """36 rows to train on and 12 to validate, of token ids that say what their class is; a BERT of width 32 from its
    config.

    Nothing is read or tokenized, so that losses can be written down here.
    """

    task = Classification()
    tokenizer = SimpleNamespace(pad_token_id=0, pad_token_type_id=0)

    def __init__(self) -> None:
        draw = random.Random("rows")
        rows = []
        for number in range(48):
            label = number % 3
            ids = [1, *(draw.randrange(4 + 20 * label, 44 + 20 * label) for _ in range(draw.randint(3, 20))), 2]
            rows.append(Example({"input_ids": ids, "token_type_ids": [0] * len(ids)}, label))
        self.examples = {"train": rows[:36], "validation": rows[36:]}

    def trainer(
        self, folder: Path, *, method: Any = "lora", dropout: bool = False, validation: bool = True, **kwargs: Any
    ) -> Trainer:
        run = {name: kwargs.pop(name) for name in ("emit", "stop") if name in kwargs}
        dtype, labels = kwargs.pop("dtype", torch.float32), kwargs.pop("labels", ())
        settings = {
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            **kwargs,
        }
        rate = 0.1 if dropout else 0.0
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=84, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            num_labels=3,
            max_position_embeddings=64, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate,
        )  # fmt: skip
        return Trainer(
            attach(BertForSequenceClassification(config).eval(), parse_method(method)),
            self.task,
            self.tokenizer,
            TrainingData(self.examples["train"], self.examples["validation"] if validation else [], labels),
            TrainingSettings(**settings),
            RunContext(Checkpoints(folder), **run),
            dtype=dtype,
        )


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def losses(trainer: Trainer) -> list[float]:
    """The loss of every step of a whole training."""
    said: list[Event] = []
    before, trainer.emit = trainer.emit, lambda event: (before(event), said.append(event))
    trainer.fit()
    return [event.values["loss"] for event in said if event.kind == "step"]


@dataclass(frozen=True)
class FailingObjective(ClassObjective):
    """Fails at chosen calls of the loss in training."""

    fail: Callable[[int, Mapping[str, Tensor], Tensor], Tensor] = lambda call, batch, loss: loss
    calls: list[int] = field(default_factory=list)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        loss = super().loss(outputs, batch, label_smoothing)
        if not torch.is_grad_enabled():
            return loss
        self.calls.append(len(self.calls) + 1)
        return self.fail(len(self.calls), batch, loss)


class Failing(Classification):
    """A task with a failing objective."""

    _objective: FailingObjective = PrivateAttr()

    def __init__(self, fail: Callable[[int, Mapping[str, Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self._objective = FailingObjective(fail=fail)

    @property
    def objective(self) -> Objective:
        return self._objective


# -- golden: the same step however it is cut up
# ---------------------------------------------------------------------------

GOLDEN = [1.09350, 1.11270, 1.09467, 1.13070, 1.09647, 1.08207, 1.09480, 1.11192]


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_gradient_accumulation_equals_large_batch(bench: Bench, tmp_path: Path, method: str) -> None:
    """36 rows in steps of 8: the last step of an epoch has 4, and the second epoch begins in the middle."""
    rate = {} if method == "lora" else {"learning_rate": 1e-3}
    whole = bench.trainer(tmp_path / "a", method=method, **rate)
    cut = bench.trainer(
        tmp_path / "b", method=method, per_device_train_batch_size=4, gradient_accumulation_steps=2, **rate
    )
    one, two = losses(whole), losses(cut)
    assert len(one) == 8
    assert one == pytest.approx(two, rel=1e-5)
    if method == "lora":
        assert one == pytest.approx(GOLDEN, abs=2e-4)
    for (key, a), (_, b) in zip(whole.adapter.state_dict().items(), cut.adapter.state_dict().items(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), key


def test_micro_batches_by_tokens_give_same_losses(bench: Bench, tmp_path: Path) -> None:
    whole = bench.trainer(tmp_path / "a", length_group=False)
    cut = bench.trainer(tmp_path / "b", length_group=False, per_device_train_tokens=40)
    pieces = micro_batches(cut.batch_sampler(0), cut.batch_sampler.lengths, cut.state.micro_batch, tokens=40)
    assert sorted(row for piece in pieces for row in piece) == sorted(whole.batch_sampler(0))
    assert len(pieces) > 2
    assert losses(whole) == pytest.approx(losses(cut), rel=1e-5)


def test_gradient_of_unequal_micro_batches_is_mean_over_targets(bench: Bench, tmp_path: Path) -> None:
    """A step of 8 rows in micro-batches of 3, 3 and 2: the gradient is still that of the mean over 8."""
    whole = bench.trainer(tmp_path / "a", max_steps=1, max_grad_norm=None)
    cut = bench.trainer(tmp_path / "b", max_steps=1, max_grad_norm=None)
    cut.state.micro_batch = 3
    rows = whole.batch_sampler(0)
    gradient, other = whole.gradients(rows, 8), cut.gradients(rows, 3)
    assert gradient.num_targets == other.num_targets == len(rows)
    assert gradient.read() == pytest.approx(other.read(), rel=1e-5)
    for a, b in zip(whole.parameters, cut.parameters, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_gradient_checkpointing_gives_same_losses(bench: Bench, tmp_path: Path) -> None:
    for method in ("lora", "prefix"):
        told = []
        for on in (False, True):
            trainer = bench.trainer(
                tmp_path / f"{method}-{on}", method=method, max_steps=3, gradient_checkpointing=on, dropout=True
            )
            recomputed, hooks = [], trainer.adapter.model.get_input_embeddings()._forward_hooks
            layer = trainer.adapter.model.bert.encoder.layer[0].attention
            layer.register_forward_hook(lambda *_, seen=recomputed: seen.append(torch.is_grad_enabled()))
            told.append(losses(trainer))
            assert recomputed.count(True) == (6 if on else 3)
            assert not hooks
        assert told[0] == pytest.approx(told[1], rel=1e-5)
        assert not trainer.adapter.model.is_gradient_checkpointing


def test_gradient_checkpointing_recomputes_no_layer_below_the_lowest_adapter(bench: Bench, tmp_path: Path) -> None:
    top = {"name": "lora", "layers": [1]}
    settings = {"max_steps": 2, "trunk_cache": False, "gradient_checkpointing": True}
    trainer = bench.trainer(tmp_path, method=top, validation=False, **settings)
    passes = [0, 0]
    for number, layer in enumerate(trainer.adapter.model.bert.encoder.layer):

        def count(*_: Any, number: int = number) -> None:
            passes[number] += 1

        layer.attention.register_forward_hook(count)
    losses(trainer)
    assert passes == [2, 4]


def test_gradient_checkpointing_unsupported_model_raises(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, gradient_checkpointing=True)
    trainer.adapter.model.supports_gradient_checkpointing = False
    with pytest.raises(UnsupportedError, match="cannot recompute"):
        trainer.fit()


def test_autocast_only_with_low_precision(bench: Bench, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    trainer = bench.trainer(tmp_path / "a", max_steps=1)
    layer = trainer.adapter.model.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.fit()
    assert set(seen) == {torch.float32}
    seen.clear()
    half = bench.trainer(tmp_path / "b", max_steps=2, dtype=torch.bfloat16)
    layer = half.adapter.model.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    values = losses(half)
    assert set(seen) == {torch.bfloat16}
    assert values == pytest.approx(GOLDEN[:2], abs=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters)
    with pytest.raises(UnsupportedError, match="float16"):
        bench.trainer(tmp_path / "c", dtype=torch.float16)


def test_fit_restores_model_mode(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, max_steps=1)
    model = trainer.adapter.model
    model.config.use_cache = True
    attributes = set(vars(model))
    trainer.fit()
    assert not model.training
    assert model.config.use_cache is True
    assert set(vars(model)) == attributes
    assert type(trainer.model) is type(model), "one process alone needs no wrapper"


def test_max_grad_norm_bounds_gradient(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path / "a", max_grad_norm=1e-3)
    _, norm, _ = trainer.gradients(trainer.batch_sampler(0), 8).read()
    clipped = torch.stack(
        [parameter.grad.norm() for parameter in trainer.parameters if parameter.grad is not None]
    ).norm()
    assert norm > 1e-3
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    free = bench.trainer(tmp_path / "b", max_grad_norm=None)
    _, unclipped, _ = free.gradients(free.batch_sampler(0), 8).read()
    assert unclipped == pytest.approx(norm, rel=1e-5)


def test_total_steps_from_epochs_or_max_steps(bench: Bench, tmp_path: Path) -> None:
    """36 rows, 8 a step: 5 steps an epoch."""
    assert bench.trainer(tmp_path, max_steps=None, num_train_epochs=3).total_steps == 15
    assert bench.trainer(tmp_path, max_steps=None, num_train_epochs=0.5).total_steps == 3
    assert bench.trainer(tmp_path, max_steps=7, num_train_epochs=3).total_steps == 7
    assert bench.trainer(tmp_path, max_steps=100, warmup_ratio=0.1).warmup_steps == 10


# -- evaluation, the best, stopping early
# ---------------------------------------------------------------------------------


def test_fit_evaluates_and_saves_when_due(bench: Bench, tmp_path: Path) -> None:
    said: list[Event] = []
    bench.trainer(tmp_path / "a", eval_steps=3, emit=said.append).fit()
    assert [event.step for event in said if event.kind == "evaluation"] == [3, 6, 8]
    assert [event.step for event in said if event.kind == "checkpoint"] == [3, 6, 8]
    said.clear()
    bench.trainer(tmp_path / "b", emit=said.append).fit()
    assert [event.step for event in said if event.kind == "evaluation"] == [5, 8], "once an epoch and at the end"
    said.clear()
    trainer = bench.trainer(tmp_path / "c", save_steps=2, validation=False, emit=said.append)
    trainer.fit()
    assert [event.step for event in said if event.kind == "checkpoint"] == [2, 4, 6, 8]
    assert [event.step for event in said if event.kind == "evaluation"] == []
    said.clear()
    bench.trainer(tmp_path / "d", logging_steps=3, emit=said.append).fit()
    steps = [event for event in said if event.kind == "step"]
    assert [event.step for event in steps] == [3, 6, 8]
    assert steps[0].values["loss"] == pytest.approx(sum(GOLDEN[:3]) / 3, abs=2e-4)


def scripted(trainer: Trainer, values: list[float], metric: str = "accuracy") -> None:
    """Evaluations whose figures are given."""
    left = iter(values)
    import graftwerk.training.callbacks.validation as loop

    class Figures:
        def __call__(self, predictions: Any, task: Any) -> dict[str, float]:
            return {"loss": 1.0, "accuracy": 0.0, metric: next(left)}

    trainer.evaluate = lambda examples, generation=None: type("P", (), {"loss": 1.0})()  # type: ignore[assignment, method-assign]
    loop.points = Figures()  # type: ignore[assignment]


@pytest.fixture
def points_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    import graftwerk.training.callbacks.validation as loop

    monkeypatch.setattr(loop, "points", loop.points)


@pytest.mark.usefixtures("points_restored")
@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("accuracy", [0.2, 0.7, 0.5, 0.7], 4), ("loss", [0.9, 0.5, 0.4, 0.6], 6), ("accuracy", [0.5, 0.5, 0.5, 0.5], 2)],
)
def test_validation_best_is_first_unbeaten(
    bench: Bench, tmp_path: Path, metric: str, values: list[float], best: int
) -> None:
    trainer = bench.trainer(tmp_path, eval_steps=2, metric_for_best=metric)
    scripted(trainer, values, metric)
    state = trainer.fit()
    assert state.best == {"step": best, "metric": metric, "value": values[best // 2 - 1]}
    assert best in trainer.checkpoints.steps()
    last = {key: tensor.clone() for key, tensor in trainer.adapter.state_dict().items()}
    assert load_best_state(trainer) == best
    handed = trainer.adapter.state_dict()
    assert all(torch.equal(handed[key], tensor) for key, tensor in trainer.checkpoints.weights(best).items())
    assert not all(torch.equal(handed[key], tensor) for key, tensor in last.items())


@pytest.mark.usefixtures("points_restored")
def test_early_stopping_ends_training_and_resume(bench: Bench, tmp_path: Path) -> None:
    said: list[Event] = []
    trainer = bench.trainer(tmp_path, eval_steps=1, early_stopping_patience=2, emit=said.append)
    scripted(trainer, [0.5, 0.6, 0.6, 0.4, 0.9, 0.9, 0.9, 0.9])
    assert trainer.fit().step == 4
    assert [event.step for event in said if event.kind == "early_stopping"] == [4]
    again = bench.trainer(tmp_path, eval_steps=1, early_stopping_patience=2)
    snapshot = again.checkpoints.load_latest()
    assert snapshot is not None
    again.restore(snapshot)
    assert again.is_finished, "a resumed run would train further"


def test_settings_needing_validation_rows_raise(bench: Bench, tmp_path: Path) -> None:
    for setting in ({"eval_steps": 2}, {"early_stopping_patience": 1}, {"metric_for_best": "loss"}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            bench.trainer(tmp_path, validation=False, **setting)


# -- faults
# ---------------------------------------------------------------------------------------------------------------


def test_step_non_finite_loss_is_skipped(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, validation=False)
    trainer.gradients.task = Failing(lambda call, batch, loss: loss * float("inf") if call == 3 else loss)
    said: list[Event] = []
    trainer.emit = said.append
    for _ in range(2):
        trainer._step()
    before = {key: tensor.clone() for key, tensor in trainer.adapter.state_dict().items()}
    moments = [trainer.optimizer.state[parameter]["exp_avg"].clone() for parameter in trainer.parameters]
    trainer._between_steps(trainer._step())
    assert all(torch.equal(before[key], tensor) for key, tensor in trainer.adapter.state_dict().items())
    assert all(
        torch.equal(moment, trainer.optimizer.state[parameter]["exp_avg"])
        for moment, parameter in zip(moments, trainer.parameters, strict=True)
    )
    assert [event.step for event in said if event.kind == "bad_step"] == [3]
    trainer._step()
    assert not all(torch.equal(before[key], tensor) for key, tensor in trainer.adapter.state_dict().items())
    assert trainer.state.bad_steps == 1


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def test_step_non_finite_gradient_is_skipped(bench: Bench, tmp_path: Path) -> None:
    for clip in (1.0, None):
        trainer = bench.trainer(tmp_path, validation=False, max_bad_steps=1, max_grad_norm=clip)
        trainer.gradients.task = Failing(lambda call, batch, loss: _NanGradient.apply(loss) if call >= 3 else loss)
        with pytest.raises(DivergedError, match="gradient of step 4") as caught:
            trainer.fit()
        assert caught.value.exit_code == 6
        assert all(torch.isfinite(parameter).all() for parameter in trainer.parameters)


def test_step_with_one_bad_micro_batch_is_skipped_alone(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, validation=False, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.gradients.task = Failing(lambda call, batch, loss: loss * float("nan") if call == 2 else loss)
    assert len(losses(trainer)) == 7
    assert trainer.state.bad_steps == 1


def too_many(limit: int) -> Failing:
    def fail(call: int, batch: dict[str, Tensor], loss: Tensor) -> Tensor:
        if len(batch["labels"]) > limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to ..."
            )
        return loss

    return Failing(fail)


def test_out_of_memory_halves_micro_batch_same_losses(bench: Bench, tmp_path: Path) -> None:
    said: list[Event] = []
    trainer = bench.trainer(tmp_path, emit=said.append)
    trainer.gradients.task = too_many(3)
    assert losses(trainer) == pytest.approx(GOLDEN, abs=2e-4)
    memory = [event.values for event in said if event.kind == "memory"]
    assert [(event["micro_batch"], event["accumulation"]) for event in memory] == [(4, 2), (2, 4)]
    assert "a step still has 8 rows" in memory[0]["text"]
    snapshot = trainer.checkpoints.load_latest()
    assert snapshot is not None
    assert snapshot.state["micro_batch"] == 2, "a resumed run would run out of memory again"


def test_out_of_memory_with_one_row_raises(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path)
    trainer.gradients.task = too_many(0)
    with pytest.raises(MemoryShortage, match=r"GiB.*up to \d+ tokens.*parameters are trained") as caught:
        trainer.fit()
    assert caught.value.exit_code == 5
    assert "gradient_checkpointing" in (caught.value.hint or "")


def test_out_of_memory_in_optimizer_raises(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwerk.training import optim

    def build_optimizer(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(optim, "build_optimizer", build_optimizer)
    with pytest.raises(MemoryShortage, match=r"optimizer's state.*up to \d+ tokens"):
        bench.trainer(tmp_path)


def test_step_other_errors_are_not_out_of_memory(bench: Bench, tmp_path: Path) -> None:
    def fail(call: int, batch: dict[str, Tensor], loss: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer = bench.trainer(tmp_path)
    trainer.gradients.task = Failing(fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.fit()


def test_out_of_memory_in_evaluation_halves_batch(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwerk.evaluation import evaluate as run

    real, sizes = run.run_model, []

    def run_model(*args: Any, batch_size: int, **kwargs: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 4:
            raise MemoryError
        return real(*args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(run, "run_model", run_model)
    trainer = bench.trainer(tmp_path, max_steps=1, per_device_eval_batch_size=16)
    trainer.fit()
    assert sizes == [16, 8, 4]
    assert trainer.state.best is not None


def test_evaluation_non_finite_scores_raise(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwerk.evaluation import evaluate as run

    broken = ClassPredictions(1.0, np.full((12, 3), np.nan), np.zeros(12, dtype=np.int64))
    monkeypatch.setattr(run, "run_model", lambda *_, **__: broken)
    with pytest.raises(DivergedError, match="scores are not finite"):
        bench.trainer(tmp_path, max_steps=1).fit()


# -- resuming
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "stop_at"), [("lora", 3), ("full", 5), ("prompt", 6)])
def test_resume_is_bit_exact(bench: Bench, tmp_path: Path, method: str, stop_at: int) -> None:
    """With dropout, evaluations in between, and the stop in and at the end of an epoch."""
    kwargs = {
        "method": method,
        "dropout": True,
        "eval_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 2,
    }
    whole, events = bench.trainer(tmp_path / "a", **kwargs), []
    whole.emit = events.append
    whole.fit()
    first = bench.trainer(tmp_path / "b", **kwargs)

    def stop(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == stop_at:
            raise KeyboardInterrupt

    first.emit = stop
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second, resumed = bench.trainer(tmp_path / "b", **kwargs), []
    random.random()
    np.random.rand()
    torch.rand(1)
    second.emit = resumed.append
    snapshot = second.checkpoints.load_latest()
    assert snapshot is not None
    assert snapshot.step == stop_at
    second.restore(snapshot)
    second.fit()

    def told(event: Event) -> dict[str, Any]:
        return {key: value for key, value in event.as_dict().items() if "seconds" not in key and key != "path"}

    kinds = ("step", "evaluation", "diagnosis")
    assert [told(e) for e in resumed if e.kind in kinds] == [
        told(e) for e in events if e.kind in kinds and e.step > stop_at
    ]
    one, two = whole.checkpoints.load(8), second.checkpoints.load(8)
    for part in ("weights", "optimizer", "rng"):
        a, b = getattr(one, part), getattr(two, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), part
    timeless = [{key: value for key, value in each.state.items() if key != "seconds"} for each in (one, two)]
    assert timeless[0] == timeless[1]


def test_restore_of_more_processes_raises(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, max_steps=1)
    trainer.fit()
    snapshot = trainer.checkpoints.load_latest()
    assert snapshot is not None
    other = type(snapshot)(**{**vars(snapshot), "state": {**snapshot.state, "processes": 2}})
    with pytest.raises(ConfigError, match="trained by 2 processes"):
        bench.trainer(tmp_path).restore(other)


def test_unreached_layers_warn_after_first_step(bench: Bench, tmp_path: Path) -> None:
    def warnings(skipped: bool, folder: str) -> list[str]:
        events: list[Event] = []
        trainer = bench.trainer(tmp_path / folder, emit=events.append, max_steps=2, validation=False)
        if skipped:
            trainer.adapter.model.bert.encoder.layer[1].forward = lambda hidden, *_, **__: hidden
        losses(trainer)
        return [event.values["text"] for event in events if event.kind == "warning"]

    assert warnings(False, "all") == []
    (text,) = warnings(True, "skipped")
    assert "12 of 28 trained tensors got no gradient in the first step" in text
    assert "encoder.layer.1" in text
