"""Masked language modelling: what is hidden, fixed in evaluation and new in training; resuming bit for bit."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.errors import ConfigError, ModelError, RunInterrupted, UnsupportedError
from graftwerk.evaluation.error_rows import read_errors
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.models.load import load_tokenizer
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.text import IGNORED
from graftwerk.training.events import Event
from graftwerk.training.train import train


@pytest.fixture(scope="session")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_tokenizer(str(tiny_encoder))


@pytest.fixture(scope="session")
def masked_model(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The tiny encoder with the head of masked language modelling."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "tiny-masked"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(tiny_encoder)).save_pretrained(folder)
    load_tokenizer(str(tiny_encoder)).save_pretrained(folder)
    return folder


def encoded(tokenizer: Any, texts: list[str], max_length: int = 512, **settings: Any) -> list[Any]:
    return Masked(**settings).encode([{"text": text} for text in texts], tokenizer, None, max_length)  # type: ignore[arg-type]


def test_encode_masks_no_special_token_and_one_token_at_least(tokenizer: Any, gloss_texts: list[str]) -> None:
    for example in encoded(tokenizer, [*gloss_texts[:60], "x"], mask_probability=0.02):
        ids, labels = example.inputs["input_ids"], example.target
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert (labels[0], labels[-1]) == (IGNORED, IGNORED)
        assert any(label != IGNORED for label in labels)


def test_hide_replaces_80_10_10_percent(tokenizer: Any) -> None:
    ids = torch.full((200, 50), 40)
    hidden, labels = Masked(mask_probability=0.3).collator.hide(ids, tokenizer, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert 0.28 < chosen.float().mean() < 0.32
    assert (labels[chosen] == 40).all()
    assert (hidden[~chosen] == 40).all()
    counts = Counter(
        "mask" if i == tokenizer.mask_token_id else "same" if i == 40 else "other" for i in hidden[chosen].tolist()
    )
    total = sum(counts.values())
    assert 0.77 < counts["mask"] / total < 0.83
    assert 0.08 < counts["other"] / total < 0.12
    assert 0.08 < counts["same"] / total < 0.12


def test_encode_masks_same_positions_whatever_other_rows(tokenizer: Any, gloss_texts: list[str]) -> None:
    first = encoded(tokenizer, gloss_texts[:4])
    torch.manual_seed(7)
    again = encoded(tokenizer, gloss_texts[:4][::-1])[::-1]
    assert [(it.inputs, it.target) for it in first] == [(it.inputs, it.target) for it in again]


def test_collate_training_masks_anew_from_torch_generator(tokenizer: Any, gloss_texts: list[str]) -> None:
    task, examples = Masked(), encoded(tokenizer, gloss_texts[:8])
    state = torch.get_rng_state()
    one, two = task.collator.collate_training(examples, tokenizer), task.collator.collate_training(examples, tokenizer)
    assert not torch.equal(one["labels"], two["labels"])
    torch.set_rng_state(state)
    assert torch.equal(task.collator.collate_training(examples, tokenizer)["input_ids"], one["input_ids"])
    for batch in (one, two):
        whole = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in whole]
        assert texts == [
            tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in gloss_texts[:8]
        ]
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        assert ((batch["labels"] != IGNORED).sum(dim=1) > 0).all()


def test_encode_long_text_is_split_into_closed_blocks(tokenizer: Any, gloss_texts: list[str]) -> None:
    text = " ".join(gloss_texts[:4])
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = encoded(tokenizer, [text], max_length=20)
    assert len(blocks) == -(-len(whole) // 18)
    assert {example.inputs["input_ids"][-1] for example in blocks} == {tokenizer.sep_token_id}
    assert sum(example.truncated for example in blocks) + sum(example.length - 2 for example in blocks) == len(whole)
    (kept,) = encoded(tokenizer, [text], max_length=20, blocks=False)
    assert (kept.length, kept.truncated) == (20, len(whole) - 18)


def test_masked_unsupported_model_tokenizer_or_setting_raises(tiny_decoder: Path) -> None:
    from transformers import BartConfig, LlamaConfig

    for config in (LlamaConfig(), BartConfig()):
        with pytest.raises(UnsupportedError, match="needs an encoder"):
            Masked().for_model(config)
    with pytest.raises(ModelError, match="no mask token"):
        encoded(load_tokenizer(str(tiny_decoder)), ["a ball"])
    with pytest.raises(ConfigError, match="mask_probability"):
        parse_task({"name": "masked", "mask_probability": 1.5})


def tree(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "task": {"name": "masked", "mask_probability": 0.3},
        "data": {"train": str(data), "validation": 24, "test": 24, "max_train_rows": 48, "max_length": 24},
        "method": "lora",
        "training": {
            "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "eval_steps": 3,
            "logging_steps": 1, "report_to": ["jsonl"],
        },
        "evaluation": {"resamples": 100},
        "output_dir": str(folder),
    }  # fmt: skip


def test_masked_run_resumes_bit_exact_and_evaluates(masked_model: Path, glosses: Path, tmp_path: Path) -> None:
    whole = train(tree(masked_model, glosses, tmp_path / "whole"), listener=lambda event: None)

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 4):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        train(tree(masked_model, glosses, tmp_path / "parts"), listener=stop)
    torch.manual_seed(99)
    parts = train(tree(masked_model, glosses, tmp_path / "parts"), resume=True, listener=lambda event: None)
    one, two = (read_tensors(run.adapter / "adapter_model.safetensors") for run in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    figure = whole.manifest["metrics"]["test"]["perplexity"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert read_errors(whole.folder)["predictions"][0]["error"] > 0
    again = evaluate(whole, resamples=100)
    assert again["metrics"]["perplexity"]["value"] == pytest.approx(figure["value"], rel=1e-5)
