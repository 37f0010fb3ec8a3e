"""Every method with every task that has a loss of its own: a step trains it, rows mix, what is stored answers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from graftwerk import activate, attach, load, save
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.tasks import tokenization
from graftwerk.tasks.base import Splits, Task
from graftwerk.tasks.example import IGNORED
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.tokenization import pad_further
from tests.contract.cases import METHODS, method_of, perturb

ROWS: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
    "regression": (("score",), [{"text": "a plant", "score": 1.5}, {"text": "to move about", "score": -2.0}]),
    "multilabel": (("a", "b", "c"), [{"text": "a plant", "labels": ["a"]}, {"text": "to move", "labels": ["b", "c"]}]),
    "token-classification": (
        ("B-X", "I-X", "O"),
        [
            {"tokens": ["a", "plant"], "tags": ["O", "B-X"]},
            {"tokens": ["to", "move", "on"], "tags": ["O", "B-X", "I-X"]},
        ],
    ),
    "similarity": ((), [{"anchor": "a plant", "positive": "grows"}, {"anchor": "to move", "positive": "on"}]),
}
"""Of each task its labels and some rows."""


def made(task: Task, model_folder: Path, labels: tuple[str, ...]) -> tuple[Any, Splits]:
    splits = Splits((), (), (), labels, "")
    torch.manual_seed(0)
    return load_model(str(model_folder), task, splits), splits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROWS)
def test_method_on_a_task_has_gradients_mixes_rows_and_is_stored(
    tiny_encoder: Path, tmp_path: Path, method: str, name: str
) -> None:
    labels, rows = ROWS[name]
    if (method, name) == ("probe", "similarity"):
        pytest.skip("a linear probe trains a task head, and vectors have none")
    task = parse_task(name).with_labels(labels)
    model, splits = made(task, tiny_encoder, labels)
    tokenizer = load_tokenizer(str(tiny_encoder))
    examples = task.encode(rows, tokenizer, splits, 32)
    batch = task.collator.collate(examples, tokenizer)
    adapter = attach(model, method_of(method), name="one")
    perturb(iter([parameter for parameter in adapter.parameters() if parameter.dim() > 0]), seed=1, scale=0.05)
    loss = task.objective.loss(task.objective.forward(model, batch), batch)
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    model.eval()

    def answers(rows_of: Any = None) -> torch.Tensor:
        with torch.inference_mode():
            return task.objective.per_row_outputs(task.objective.forward(model, batch), batch)

    alone = answers()
    if adapter.method.supports_rows:
        attach(model, method_of("bitfit"), name="two")
        activate(model, "two")
        other = answers()
        activate(model, rows=["one", "two"] * (2 if task.collator.several else 1))  # the first texts, then the second
        mixed = answers()
        torch.testing.assert_close(mixed[:1], alone[:1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1:], other[1:], atol=1e-5, rtol=1e-4)
    folder = save(adapter, tmp_path / "adapter")
    fresh, _ = made(task, tiny_encoder, labels)
    load(fresh, folder)
    model = fresh.eval()
    torch.testing.assert_close(answers(), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [*ROWS, "classification", "masked", "causal", "summarization bart", "summarization t5"]
)
def test_batch_that_is_padded_further_has_the_same_loss_and_answers(
    name: str, tiny_encoder: Path, tiny_decoder: Path, text_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training and evaluation in 16 bits pad it."""
    task_name, _, family = name.partition(" ")
    labels, rows = ROWS.get(name, ((), [{"text": "a plant"}, {"text": "to move about"}]))
    if name == "classification":
        labels, rows = ("a", "b"), [{**row, "label": label} for row, label in zip(rows, "ab", strict=True)]
    if family:
        rows = [{"document": "a plant that grows", "summary": "it grows"}, {"document": "to move", "summary": "go"}]
    folder = text_model(family) if family else tiny_decoder if name == "causal" else tiny_encoder
    tokenizer = load_tokenizer(str(folder))
    task = parse_task(task_name).for_model(AutoConfig.from_pretrained(folder)).with_labels(labels)
    model, splits = made(task, folder, labels)
    model.float().eval()
    examples = task.encode(rows, tokenizer, splits, 32)
    torch.manual_seed(0)
    batch = task.collator.collate(examples, tokenizer)
    width = batch["input_ids"].shape[1]
    monkeypatch.setattr(tokenization, "MULTIPLE", width + 3)
    further = pad_further(batch, 1000, tokenizer)
    assert further["input_ids"].shape[1] == further["attention_mask"].shape[1] == width + 3
    with torch.inference_mode():
        outputs = [task.objective.forward(model, task.objective.prepare(one, model)) for one in (batch, further)]
        losses = [task.objective.loss(out, one) for out, one in zip(outputs, (batch, further), strict=True)]
        answers = [task.objective.per_row_outputs(out, one) for out, one in zip(outputs, (batch, further), strict=True)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert task.objective.num_targets(further) == task.objective.num_targets(batch)
    for row, (before, after) in enumerate(zip(*answers, strict=True)):
        real = slice(examples[row].length) if before.shape != after.shape else slice(None)
        torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=1e-4)


def test_padding_further_stays_within_the_longest_row(tiny_encoder: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_encoder))
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "token_type_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long),
    }  # fmt: skip
    further = pad_further(batch, 6, tokenizer)
    assert {key: value[0, -1].item() for key, value in further.items()} == {
        "input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id,
        "labels": IGNORED,
    }  # fmt: skip
    assert {value.shape[1] for value in further.values()} == {6}
    several = {**batch, "labels": torch.ones(2, 3)}  # a number for each class
    assert pad_further(several, 6, tokenizer)["labels"].shape == (2, 3)
    assert pad_further(batch, 4, tokenizer)["input_ids"].shape == (2, 5)
