"""A grafted model under transformers' own Trainer: what trains is the graft, what is saved comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import graftwerk.inject.attach as gw
from tests.contract.cases import method_of, model_and_batch

CASES = [
    ("lora", "bert"),
    ("dora", "llama"),
    ("houlsby", "bert"),
    ("parallel", "gpt2"),
    ("prefix", "bert"),
    ("prefix mlp", "t5"),
    ("prompt", "llama"),
    ("ptuning lstm", "bert"),
    ("ia3", "bart"),
    ("bitfit", "opt"),
    ("probe", "bert"),
    ("full", "bert"),
]


def rows(method: str, family: str) -> list[dict[str, Any]]:
    _, batch = model_and_batch(method, family, rows=8)
    rows = [{key: value[index] for key, value in batch.items()} for index in range(8)]
    for row in rows:
        if family == "bert":
            row["labels"] = row["input_ids"][0] % 3
        elif "decoder_input_ids" in row:
            row["labels"] = row.pop("decoder_input_ids")
        else:
            row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    return rows


@pytest.mark.parametrize(("method", "family"), CASES)
def test_trainer(method: str, family: str, tmp_path: Path) -> None:
    model, _ = model_and_batch(method, family)
    torch.manual_seed(0)
    graft = gw.attach(model, method_of(method), name="a")
    base = {name: value.clone() for name, value in model.state_dict().items() if "graft" not in name.split(".")}
    before = {key: value.clone() for key, value in graft.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(method, family))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = [key for key, parameter in graft.named_parameters() if not torch.equal(parameter, before[key])]
    assert moved
    if method != "full":
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in base.items())
    evaluated = trainer.evaluate(rows(method, family))
    assert evaluated["eval_loss"] > 0
