"""A grafted model under transformers' own Trainer: what trains is the graft, as a plain loop would train it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import graftwerk.modeling.attach as gw
from tests.contract.cases import METHODS, PAIRS, has_head, method_of, model_and_batch
from tests.families import FAMILIES

STEPS, RATE = 2, 1e-2


def _cases() -> list[tuple[str, str]]:
    """Three families for each method, round and round, so that each family gets three methods or more."""
    names, at, cases = list(FAMILIES), 0, []
    for method in METHODS:
        left = 3
        while left:
            family = names[at % len(names)]
            at += 1
            if (method, family) in PAIRS:
                cases.append((method, family))
                left -= 1
    return cases


CASES = _cases()


def test_every_method_and_every_family_is_tried() -> None:
    assert len(set(CASES)) == len(CASES)
    methods, families = Counter(method for method, _ in CASES), Counter(family for _, family in CASES)
    assert min(methods[name] for name in METHODS) >= 3
    assert min(families[name] for name in FAMILIES) >= 3


def grafted(method: str, family: str) -> tuple[Any, gw.Adapter, dict[str, Tensor]]:
    """A model, its graft, and a batch with labels: the same with each call."""
    model, batch = model_and_batch(method, family, rows=3)
    torch.manual_seed(0)
    graft = gw.attach(model, method_of(method), name="a")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if has_head(method, FAMILIES[family]):
        batch["labels"] = ids[:, 0] % 3
    elif "decoder_input_ids" in batch:
        batch["labels"] = batch.pop("decoder_input_ids")
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return model, graft, batch


def values(graft: gw.Adapter) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in graft.state_dict().items()}


def base_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "graft" not in name.split(".")}


class Told(Trainer):  # type: ignore[misc]
    """Keeps each step's loss as it is, and how many labels it was told that there are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[Tensor] = []
        self.items: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **options)
        self.losses.append(loss.detach().clone())
        self.items = num_items_in_batch
        return loss


@pytest.mark.parametrize(("method", "family"), CASES)
def test_trainer(method: str, family: str, tmp_path: Path) -> None:
    model, graft, batch = grafted(method, family)
    base, before = base_of(model), values(graft)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=RATE,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{key: value[index] for key, value in batch.items()} for index in range(3)]
    trainer = Told(model=model, args=arguments, train_dataset=rows)
    trainer.train()

    assert len(trainer.losses) == STEPS
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([loss.item() for loss in trainer.losses], rel=1e-4)
    assert any(not torch.equal(value, before[key]) for key, value in graft.state_dict().items())
    if method != "full":
        now = base_of(model)
        assert now.keys() == base.keys()
        assert all(torch.equal(now[name], value) for name, value in base.items())

    other, same, batch = grafted(method, family)
    other.train()
    told = (
        {} if trainer.items is None or not trainer.model_accepts_loss_kwargs else {"num_items_in_batch": trainer.items}
    )
    optimizer = torch.optim.AdamW(same.parameters(), lr=RATE, weight_decay=0.0)
    for expected in trainer.losses:
        loss = other(**batch, **told).loss
        torch.testing.assert_close(expected, loss.detach(), rtol=0, atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ends = values(same)
    for key, value in graft.state_dict().items():
        torch.testing.assert_close(value, ends[key], rtol=0, atol=0, msg=lambda text, at=key: f"{at}: {text}")
