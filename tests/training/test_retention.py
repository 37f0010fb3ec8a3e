"""Strategies against forgetting: what each computes, against an oracle; they combine, and resume bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, ConflictError, RunInterrupted
from graftwerk.methods.registry import METHODS
from graftwerk.tasks.objective import ScoreObjective
from graftwerk.training.events import Event
from graftwerk.training.planning import step_trace
from graftwerk.training.retention.base import kept_examples
from graftwerk.training.retention.consolidation import Consolidation
from graftwerk.training.retention.distillation import Distillation
from graftwerk.training.retention.early_stopping import RetainedStop
from graftwerk.training.retention.replay import Replay
from graftwerk.training.retention.retention import Retention
from graftwerk.training.train import train
from graftwerk.training.trainer import Trainer
from tests.training.test_planning import RealTensors, total, traced

Tree = dict[str, Any]
FIRST, SECOND = ["noun.act", "noun.animal"], ["noun.body", "noun.food", "noun.plant"]
ALL: Tree = {"replay": 0.5, "distillation": 0.5, "consolidation": 2.0}


def quiet(event: Event) -> None:
    """Say nothing."""


def stopping_at(step: int) -> Callable[[Event], None]:
    """A listener that stops the process once the checkpoint of a step is written."""

    def stop(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


class Killed(BaseException):
    """The end of a process that saves nothing more."""


def killed_at(step: int) -> Callable[[Event], None]:
    """A listener that ends the run once the checkpoint of a step is written."""

    def kill(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == step:
            raise Killed

    return kill


@pytest.fixture(scope="module")
def tree(tiny_encoder: Path, glosses: Path) -> Callable[..., Tree]:
    def build(output_dir: Path, classes: list[str], method: Any = "lora", **training: Any) -> Tree:
        data = {
            "train": str(glosses),
            "filter": {"label": classes},
            "max_train_rows": 20,
            "validation": None,
            "test": 8,
            "max_length": 16,
            "max_truncated": 1.0,
        }
        usual = {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "report_to": []}
        return {
            "model": str(tiny_encoder),
            "data": data,
            "method": method,
            "training": {**usual, **training},
            "evaluation": {"resamples": 100, "latency_batches": 1},
            "output_dir": str(output_dir),
        }

    return build


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tree: Callable[..., Tree]) -> Path:
    return train(tree(tmp_path_factory.mktemp("earlier") / "run", FIRST), listener=quiet).folder


@pytest.fixture(scope="module")
def later(tree: Callable[..., Tree], earlier: Path) -> Callable[..., Tree]:
    """A run on other classes that starts from the earlier run's weights."""

    def build(
        output_dir: Path, retain: Tree | None, method: Any = "lora", run: Path = earlier, **training: Any
    ) -> Tree:
        given = tree(output_dir, SECOND, method, warm_start=str(run), new_head=True, retain=retain, **training)
        given["evaluation"]["retained"] = {"first": {"run": str(run)}}
        return given

    return build


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Retention, Trainer]]:
    """The strategies of the runs that are trained, as they were started."""
    found: list[tuple[Retention, Trainer]] = []
    retain = Trainer.retain

    def caught(self: Trainer, retention: Retention) -> None:
        retain(self, retention)
        found.append((retention, self))

    monkeypatch.setattr(Trainer, "retain", caught)
    return found


def weights(run: Any) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_trace_with_heads_of_earlier_runs_has_the_bytes_of_a_real_step(
    tmp_path: Path, later: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the plan of a run: its answers to the own rows are recorded, and their rows lend their heads."""
    config = RunConfig.build(later(tmp_path / "run", ALL))
    planned = traced(config, tmp_path)
    monkeypatch.setattr(step_trace, "FakeTensorMode", RealTensors)
    real = traced(config, tmp_path)
    assert planned.step_peak == pytest.approx(real.step_peak, rel=0.02)
    assert total(planned.work) == pytest.approx(total(real.work), rel=0.1)  # collating, too, makes tensors


def test_strategies_combine_and_say_what_they_cost(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    run = train(later(tmp_path / "run", ALL), listener=quiet)
    cost = run.manifest["cost"]["retention"]
    assert list(cost["strategies"]) == ["replay", "distillation", "consolidation"]
    assert cost["bytes"] == sum(cost["strategies"].values()) > 0
    assert cost["step_seconds"] > 0
    plain = train(later(tmp_path / "plain", None), listener=quiet)
    assert weights(plain) != weights(run)
    assert "retention" not in plain.manifest["cost"]


def test_replay_rows_are_training_rows_and_follow_from_the_step(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    """And their loss is the mean of the earlier head's on the model's features."""
    train(later(tmp_path / "run", {"replay": {"share": 0.5, "rows": 9, "weight": 3.0}}), listener=quiet)
    (replay,), trainer = caught[0][0].strategies, caught[0][1]
    assert isinstance(replay, Replay)
    setting = replay.setting
    (entry,) = setting.meter.entries
    assert len(replay.memory) == 9
    assert entry.evaluation is not None  # by which its answers are written: the earlier run's
    assert entry.evaluation.resamples == 100
    measured = {tuple(example.inputs["input_ids"]) for example in entry.examples}
    assert not measured & {tuple(example.inputs["input_ids"]) for _, example in replay.memory}
    assert replay.drawn(3, 6) == replay.drawn(3, 6) != replay.drawn(4, 6)
    assert len(replay.drawn(0, 6)) == 3
    model = trainer.adapter.model.eval()
    own = trainer.gradients.batches.prepare(trainer.batch_sampler(0), 6)
    found = sum(float(loss.detach()) for loss in replay.losses(0, own, trainer.gradients))
    ((path, head),) = setting.meter.heads["first"].items()
    hidden: dict[str, torch.Tensor] = {}
    slot = model.get_submodule(path).graft._modules["default"]
    handle = slot.register_forward_pre_hook(lambda module, given: hidden.update(x=given[0]))
    losses = []
    for place in replay.drawn(0, 6):
        batch = entry.task.collator.collate([replay.memory[place][1]], setting.tokenizer)
        with torch.no_grad():
            entry.task.objective.forward(model, batch)
            losses.append(float(torch.nn.functional.cross_entropy(head(hidden["x"]), batch["labels"])))
    handle.remove()
    assert found == pytest.approx(3.0 * float(np.mean(losses)), rel=1e-5)


def test_distillation_is_zero_at_the_start_and_grows(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    seen: list[float] = []
    original = Distillation.losses

    def losses(self: Distillation, step: int, own: Any, gradients: Any) -> Any:
        self.setting.adapter.model.eval()  # without dropout the student is the teacher at first
        for loss in original(self, step, own, gradients):
            seen.append(float(loss.detach()))
            yield loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "losses", losses)
        train(later(tmp_path / "run", {"distillation": True}, learning_rate=5e-2), listener=quiet)
    assert seen[0] == pytest.approx(0.0, abs=1e-6)
    assert seen[-1] > 1e-5


@pytest.mark.parametrize("method", ["lora", pytest.param("oft", marks=pytest.mark.slow)])
def test_fisher_of_the_update_equals_autograd_of_the_weight(
    tmp_path: Path,
    tree: Callable[..., Tree],
    later: Callable[..., Tree],
    method: str,
    caught: list[tuple[Retention, Trainer]],
) -> None:
    """The oracle: the adapter merged into a weight that requires a gradient, row by row."""
    run = train(tree(tmp_path / "first", FIRST, method), listener=quiet).folder
    train(
        later(tmp_path / "run", {"consolidation": {"rows": 5}}, method, run, max_steps=1, learning_rate=1e-12),
        listener=quiet,
    )
    (strategy,), trainer = caught[0][0].strategies, caught[0][1]
    assert isinstance(strategy, Consolidation)
    assert strategy.layers
    setting, model = strategy.setting, trainer.adapter.model.eval()
    path = next(path for path in strategy.layers if path.endswith("layer.1.attention.self.value"))
    (entry,) = setting.meter.entries
    from graftwerk.training.retention.base import batches_of

    examples = kept_examples(setting, entry, 5, "consolidation")
    assert len(examples) == 5
    other = replace(entry, name="other", examples=examples[:2])  # measured on rows that this one was trained on
    crossed = SimpleNamespace(tokenizer=setting.tokenizer, meter=SimpleNamespace(entries=[entry, other]))
    assert kept_examples(crossed, entry, 5, "consolidation") == examples[2:]  # type: ignore[arg-type]
    trainer.adapter.merge()
    weight = model.get_submodule(path).weight
    weight.requires_grad_(True)
    expected = torch.zeros_like(weight)
    for _, batch in batches_of(setting, entry.task, examples, 1):
        with setting.meter.lent(entry):
            loss = entry.task.objective.loss(entry.task.objective.forward(model, batch), batch)
        (gradient,) = torch.autograd.grad(loss, [weight])
        expected += gradient**2 / 5
    torch.testing.assert_close(strategy.fisher[path], expected, rtol=2e-3, atol=1e-9)


def test_consolidation_holds_the_weights_that_matter(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    """The change of weights, each times its Fisher information, is smaller by far under a heavy weight."""
    changes = []
    for name, weight in (("held", 1e6), ("loose", 1e-6)):
        train(later(tmp_path / name, {"consolidation": weight}, learning_rate=5e-2), listener=quiet)
        (strategy,), trainer = caught[-1][0].strategies, caught[-1][1]
        own = trainer.gradients.batches.prepare(trainer.batch_sampler(0), 6)
        changes.append(sum(float(loss.detach()) for loss in strategy.losses(0, own, trainer.gradients)) / weight)
    assert 0 < changes[0] < changes[1] / 3


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in ("prefix",) else pytest.mark.slow) for name in METHODS]
)
def test_strategies_work_with_every_method_and_resume_bit_for_bit(
    tmp_path: Path, tree: Callable[..., Tree], later: Callable[..., Tree], method: str
) -> None:
    first = train(tree(tmp_path / "first", FIRST, method, learning_rate=1e-3), listener=quiet).folder
    if method == "probe":  # nothing is shared between tasks
        with pytest.raises(ConfigError):
            train(later(tmp_path / "run", ALL, method, first), listener=quiet)
        return
    whole = train(later(tmp_path / "whole", ALL, method, first, learning_rate=1e-3, save_steps=1), listener=quiet)

    given = later(tmp_path / "stopped", ALL, method, first, learning_rate=1e-3, save_steps=1)
    with pytest.raises(RunInterrupted):
        train(given, listener=stopping_at(2))
    resumed = train(given, resume=True, listener=quiet)
    assert weights(resumed) == weights(whole)
    assert (
        resumed.manifest["retained"]["entries"]["first"]["after"]
        == whole.manifest["retained"]["entries"]["first"]["after"]
    )


def test_resuming_with_other_strategies_raises(tmp_path: Path, later: Callable[..., Tree]) -> None:
    with pytest.raises(RunInterrupted):
        train(later(tmp_path / "run", {"replay": 0.5}, save_steps=2), listener=stopping_at(2))
    with pytest.raises(ConflictError, match=r"retain\.replay\.share"):
        train(later(tmp_path / "run", {"replay": 0.25}, save_steps=2), resume=True, listener=quiet)


@pytest.mark.parametrize(
    ("retain", "retained", "said"),
    [
        ({}, {}, "name a strategy"),
        ({"replay": True}, {}, "evaluation.retained"),
        ({"early_stopping": "2 points"}, {}, "evaluation.retained"),
        ({"replay": {"part": 1}}, {"first": {"run": "x"}}, "unknown key"),
    ],
)
def test_invalid_retain_raises(tree: Callable[..., Tree], retain: Tree, retained: Tree, said: str) -> None:
    given = tree(Path("run"), SECOND, retain=retain)
    given["evaluation"]["retained"] = retained
    with pytest.raises(ConfigError, match=said):
        RunConfig.build(given)


@pytest.mark.slow
def test_text_model_is_distilled_towards_its_base(tmp_path: Path, tiny_decoder: Path, glosses: Path) -> None:
    """Perplexity of general text moves less; the adapter is switched off for the teacher's pass, and on again."""
    found = []
    for name, retain in (("plain", None), ("held", {"distillation": 20.0, "replay": 1.0, "self_replay": {"rows": 8}})):
        given = {
            "model": str(tiny_decoder),
            "task": "causal",
            "data": {"train": str(glosses), "max_train_rows": 24, "validation": None, "test": 4, "max_length": 16},
            "method": "lora",
            "training": {
                "max_steps": 6,
                "learning_rate": 2e-2,
                "per_device_train_batch_size": 4,
                "report_to": [],
                "retain": retain,
            },
            "evaluation": {"resamples": 100, "retained": "general"},
            "output_dir": str(tmp_path / name),
        }
        found.append(train(given, listener=quiet).manifest["retained"]["entries"]["general"])
    plain, held = found
    assert held["before"] == plain["before"]
    assert abs(np.log(held["after"]["value"] / held["before"]["value"])) < abs(
        np.log(plain["after"]["value"] / plain["before"]["value"])
    )


@pytest.mark.parametrize("validation", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_early_stopping_saves_the_best_step_within_the_bound_and_resumes(
    tmp_path: Path, later: Callable[..., Tree], validation: int | None, caught: list[tuple[Retention, Trainer]]
) -> None:
    """The losses of each evaluation are given: 1, 2 and 9 points."""
    losses: Iterator[float]

    def build(name: str) -> Tree:
        nonlocal losses
        losses = iter([1.0, 2.0, 9.0])
        given = later(tmp_path / name, {"early_stopping": "5 points"}, eval_steps=1, max_steps=6)
        given["data"]["validation"] = validation
        return given

    def lost(self: RetainedStop, entry: Any) -> tuple[str, float, float]:
        points = next(losses)
        return "accuracy", points, points

    said: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetainedStop, "_lost", lost)
        patch.setattr(
            "graftwerk.training.callbacks.validation.is_better", lambda *given: True
        )  # the last one evaluated is best
        run = train(build("whole"), listener=said.append)
        given = build("stopped")
        with pytest.raises(RunInterrupted):
            train(given, listener=stopping_at(2))
        resumed = train(given, resume=True, listener=quiet)
        given = build("killed")
        with pytest.raises(Killed):
            train(given, listener=killed_at(3))  # too much is lost, and nothing but the checkpoint knows
        ended = train(given, resume=True, listener=quiet)
    best = run.manifest["best"]
    assert run.manifest["cost"]["steps"] == 3
    assert best["step"] == 2
    assert (best["metric"] == "forgetting") == (validation is None)
    (event,) = (event for event in said if event.kind == "early_stopping")
    assert "`first` has lost 9.0 points" in event.values["text"]
    assert f"step {best['step']} is saved" in event.values["text"]
    assert run.manifest["cost"]["retention"]["step_seconds"] > 0
    assert weights(ended) == weights(resumed) == weights(run)
    assert ended.manifest["cost"]["steps"] == 3
    watch, trainer = caught[0][0].watch, caught[0][1]
    assert watch is not None
    measured = {tuple(example.inputs["input_ids"]) for example in watch.setting.meter.entries[0].examples}
    assert not measured & {tuple(example.inputs["input_ids"]) for example in watch.entries[0].examples}
    at_best = trainer.checkpoints.weights(best["step"])
    assert all(torch.equal(at_best[key], value) for key, value in trainer.adapter.state_dict().items())


def test_early_stopping_measures_what_is_lost(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    """By the oracle: the share of the watched rows that the earlier head gets right, before and now."""
    train(later(tmp_path / "run", {"early_stopping": "100 %"}, learning_rate=5e-2, max_steps=6), listener=quiet)
    watch = caught[0][0].watch
    assert watch is not None
    (entry,) = watch.entries
    found: Any = watch.setting.meter.measure(entry)
    watch.before["first"] = replace(found, scores=np.eye(found.scores.shape[1])[found.targets])  # all right
    right = [np.mean(each.scores.argmax(1) == each.targets) for each in (watch.before["first"], found)]  # type: ignore[attr-defined]
    assert watch._lost(entry)[:2] == ("accuracy", pytest.approx(100 * (right[0] - right[1])))
    assert right[0] == 1.0 > right[1]
    validated = replace(entry, splits=replace(entry.splits, validation=entry.splits.train[:3]))
    assert len(kept_examples(watch.setting, validated, 500, "early_stopping")) > 3
    assert len(kept_examples(watch.setting, validated, 500, "early_stopping", held_out=True)) == 3


def test_early_stopping_without_the_best_state_raises(tmp_path: Path, later: Callable[..., Tree]) -> None:
    with pytest.raises(ConfigError, match="load_best"):
        train(later(tmp_path / "run", {"early_stopping": True}, load_best=False), listener=quiet)


def test_resuming_after_the_earlier_run_was_learnt_anew_raises(
    tmp_path: Path, tree: Callable[..., Tree], later: Callable[..., Tree]
) -> None:
    """Its rows are the same; its weights, from which the run has started and whose head answers, are not."""
    first = tree(tmp_path / "first", FIRST)
    train(first, listener=quiet)
    given = later(tmp_path / "run", {"replay": 0.5}, run=tmp_path / "first", save_steps=2)
    with pytest.raises(RunInterrupted):
        train(given, listener=stopping_at(2))
    train(tree(tmp_path / "first", FIRST, seed=1), overwrite=True, listener=quiet)
    with pytest.raises(ConflictError, match="retained"):
        train(given, resume=True, listener=quiet)


def test_fisher_in_float16_is_that_in_float32_where_gradients_are_small(
    tmp_path: Path, later: Callable[..., Tree], caught: list[tuple[Retention, Trainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(later(tmp_path / "run", {"consolidation": {"rows": 5}}, max_steps=1), listener=quiet)
    (strategy,) = caught[0][0].strategies
    assert isinstance(strategy, Consolidation)
    objective = type(strategy.setting.meter.entries[0].task.objective)
    loss = objective.loss
    monkeypatch.setattr(objective, "loss", lambda self, *given: loss(self, *given) * 1e-3)
    strategy.start()
    expected = {key: value.clone() for key, value in strategy.fisher.items()}
    strategy.setting.meter.evaluator.dtype = torch.float16
    strategy.start()
    apart = {
        key: float((value - expected[key]).norm() / expected[key].norm()) for key, value in strategy.fisher.items()
    }
    assert max(apart.values()) < 0.05, apart


@pytest.fixture(scope="module")
def text_run(tiny_decoder: Path, glosses: Path) -> Callable[..., Tree]:
    def build(output_dir: Path, retain: Tree | None = None, **training: Any) -> Tree:
        usual = {"max_steps": 2, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "report_to": []}
        return {
            "model": str(tiny_decoder),
            "task": "causal",
            "data": {"train": str(glosses), "max_train_rows": 8, "validation": None, "test": 4, "max_length": 16},
            "method": "lora",
            "training": {**usual, "retain": retain, **training},
            "evaluation": {"resamples": 100, "retained": {"general": {"texts": "general", "max_rows": 8}}},
            "output_dir": str(output_dir),
        }

    return build


def test_text_is_distilled_towards_the_model_before_the_task(
    tmp_path: Path, text_run: Callable[..., Tree], caught: list[tuple[Retention, Trainer]]
) -> None:
    """After a warm start the teacher is the start: nothing diverges in the first step. The base is far from it."""
    first = train(text_run(tmp_path / "first"), listener=quiet).folder
    found: dict[str, list[float]] = {}
    original = Distillation.losses

    def losses(self: Distillation, step: int, own: Any, gradients: Any) -> Any:
        before = {key: value.detach().clone() for key, value in self.setting.adapter.named_parameters()}
        for loss in original(self, step, own, gradients):
            found.setdefault(self.settings.teacher, []).append(float(loss.detach()))
            yield loss
        after = dict(self.setting.adapter.named_parameters())
        assert all(torch.equal(after[key], value) for key, value in before.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "losses", losses)
        for teacher in ("auto", "base"):
            retain = {"distillation": {"teacher": teacher}}
            train(text_run(tmp_path / teacher, retain, warm_start=str(first)), listener=quiet)
    assert found["auto"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["auto"][-1] > 1e-5
    assert found["base"][0] > 1e-3


def test_distilled_numbers_do_not_depend_on_how_a_step_is_cut() -> None:
    """A micro-batch of one row has no variance of its own."""
    answers = torch.tensor([[1.0], [3.0], [8.0]])
    apart = Distillation._apart(None, ScoreObjective(), answers[:1] + 1, answers[:1], answers)  # type: ignore[arg-type]
    assert float(apart) == pytest.approx(1 / 13)
