"""Class weights: torch's weighted mean, however a step is cut, and only in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from graftwerk.errors import ConfigError
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.registry import parse_task
from graftwerk.training.class_weights import weighted_task
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.validation import check_settings
from tests.training.test_trainer import Bench, losses

NAMES = ("low", "middle", "high")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_class_weights_named_and_balanced(bench: Bench) -> None:
    rows = bench.examples["train"][:9] + [row for row in bench.examples["train"][9:] if row.target == 1]
    named = weighted_task(TrainingSettings(class_weights={"high": 3.0}), Classification(), NAMES, rows)
    assert isinstance(named, Classification)
    assert [named.weight_of(label) for label in range(3)] == [1.0, 1.0, 3.0]
    balanced = weighted_task(TrainingSettings(class_weights="balanced"), Classification(), NAMES, rows)
    assert isinstance(balanced, Classification)
    counts = [sum(row.target == label for row in rows) for label in range(3)]
    assert len(set(counts)) > 1
    weights = [balanced.weight_of(label) for label in range(3)]
    assert weights == pytest.approx([len(rows) / (3 * count) for count in counts])
    batch = balanced.collator.collate(rows, bench.tokenizer)
    assert balanced.objective.num_targets(batch) == pytest.approx(len(rows))


def test_class_weights_loss_equals_torch_weighted_mean(bench: Bench) -> None:
    from types import SimpleNamespace

    task = Classification().weighted([0.5, 1.0, 4.0])
    batch = task.collator.collate(bench.examples["train"][:8], bench.tokenizer)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    loss = task.objective.loss(SimpleNamespace(logits=logits), batch, 0.1)
    expected = F.cross_entropy(logits, batch["labels"], weight=torch.tensor([0.5, 1.0, 4.0]), label_smoothing=0.1)
    assert torch.equal(loss, expected)
    pieces = [task.collator.collate(bench.examples["train"][a:b], bench.tokenizer) for a, b in ((0, 3), (3, 8))]
    parts = [
        float(task.objective.loss(SimpleNamespace(logits=logits[a:b]), piece, 0.1)) * task.objective.num_targets(piece)
        for (a, b), piece in zip(((0, 3), (3, 8)), pieces, strict=True)
    ]
    assert sum(parts) / task.objective.num_targets(batch) == pytest.approx(float(expected), abs=1e-6)


def test_class_weights_step_is_independent_of_micro_batches(bench: Bench, tmp_path: Path) -> None:
    weights = {"low": 0.25, "high": 5.0}
    whole = bench.trainer(tmp_path / "a", class_weights=weights, labels=NAMES, max_steps=4)
    cut = bench.trainer(tmp_path / "b", class_weights=weights, labels=NAMES, max_steps=4, per_device_train_tokens=40)
    plain = bench.trainer(tmp_path / "c", max_steps=4)
    one = losses(whole)
    assert one == pytest.approx(losses(cut), rel=1e-5)
    assert one != pytest.approx(losses(plain), rel=1e-3)
    # evaluation is the same for all: before anything is trained, and after with its own weights
    fresh = [bench.trainer(tmp_path / name, **given) for name, given in (("d", {}), ("e", {"class_weights": weights,
        "labels": NAMES}))]  # fmt: skip
    assert len({trainer.evaluate(trainer.validation).loss for trainer in fresh}) == 1


def test_class_weights_unknown_name_or_task_without_classes_raises(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="there is no class `hihg`") as caught:
        weighted_task(TrainingSettings(class_weights={"hihg": 2.0}), Classification(), NAMES, [])
    assert "high" in str(caught.value.hint)
    for task in ("causal", "masked", "summarization"):
        with pytest.raises(ConfigError, match="has no classes"):
            check_settings(TrainingSettings(class_weights="balanced"), True, parse_task(task))


def test_class_weights_balanced_divide_by_every_class_though_one_has_no_row(bench: Bench) -> None:
    rows = [row for row in bench.examples["train"] if row.target != 2]
    task = weighted_task(TrainingSettings(class_weights="balanced"), Classification(), NAMES, rows)
    assert isinstance(task, Classification)
    counts = [sum(row.target == label for row in rows) for label in range(2)]
    assert [task.weight_of(label) for label in range(2)] == pytest.approx([len(rows) / (3 * n) for n in counts])
