"""Every method with every task that has a loss of its own: a step trains it, rows mix, what is stored answers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk import activate, attach, load, save
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.tasks.base import Splits, Task
from graftwerk.tasks.registry import parse_task
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
