"""Causal models: plain text, instructions and classes from a run file, through training, evaluation and prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.error_rows import read_errors
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.models.load import load_tokenizer
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.chunking import text_blocks
from graftwerk.training.train import train


@pytest.fixture(scope="session")
def tokenizer(tiny_decoder: Path) -> Any:
    return load_tokenizer(str(tiny_decoder))


def encoded(tokenizer: Any, texts: list[str], max_length: int = 64, **settings: Any) -> list[Any]:
    return Causal(**settings).encode([{"text": text} for text in texts], tokenizer, None, max_length)  # type: ignore[arg-type]


def test_causal_encode_trains_every_token_including_eos(tokenizer: Any) -> None:
    (example,) = encoded(tokenizer, ["a short high fly ball"])
    text = tokenizer("a short high fly ball", add_special_tokens=False)["input_ids"]
    assert example.inputs["input_ids"] == example.target == [*text, tokenizer.eos_token_id]
    batch = Causal().collator.collate([example], tokenizer)
    assert Causal().objective.num_targets(batch) == len(
        text
    )  # the first token is predicted by nothing, the end by the last


def test_causal_encode_bos_opens_every_block(tiny_decoder: Path) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(str(tiny_decoder))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    blocks = encoded(tokenizer, ["a short high fly ball " * 5], max_length=12)
    assert len(blocks) > 2
    assert {example.inputs["input_ids"][0] for example in blocks} == {tokenizer.bos_token_id}
    ends = [example.inputs["input_ids"][-1] == tokenizer.eos_token_id for example in blocks]
    assert ends == [False] * (len(blocks) - 1) + [True]


def test_causal_encode_truncated_tokens_are_counted(tokenizer: Any) -> None:
    text = "a short high fly ball " * 5
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    (kept,) = encoded(tokenizer, [text], max_length=10, blocks=False)
    assert (kept.length, kept.truncated) == (10, tokens - 9)
    blocks = encoded(tokenizer, [text], max_length=10)
    assert sum(example.length + example.truncated for example in blocks) == tokens + 1
    with pytest.raises(ConfigError, match="leaves no room"):
        encoded(tokenizer, [text], max_length=2)


def test_causal_read_rows_without_text_raise(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match="no format"):
        Causal().read(DataSettings(train=str(rows), validation=None))


def test_causal_for_model_encoder_decoder_raises() -> None:
    from transformers import T5Config

    with pytest.raises(UnsupportedError):
        Causal().for_model(T5Config())


def tree(model: Path, data: Path, folder: Path, task: Any, method: Any = "lora", **training: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "task": task,
        "data": {
            "train": str(data), "validation": 12, "test": 12, "max_train_rows": 36, "max_length": 48,
            "max_truncated": 1.0,
        },
        "method": method,
        "training": {
            "max_steps": 3, "per_device_train_batch_size": 12, "learning_rate": 1e-2, "logging_steps": 1,
            "report_to": ["jsonl"], **training,
        },
        "evaluation": {"resamples": 100, "max_new_tokens": 3, "latency_batches": 1},
        "output_dir": str(folder),
    }  # fmt: skip


INSTRUCTION = {"name": "instruction", "prompt": "which kind is {text}", "answer": "{label}"}


def test_causal_run_trains_and_evaluates(tiny_decoder: Path, glosses: Path, tmp_path: Path) -> None:
    run = train(tree(tiny_decoder, glosses, tmp_path / "run", "causal"), listener=lambda event: None)
    figure = run.manifest["metrics"]["test"]["perplexity"]
    assert evaluate(run, resamples=100)["metrics"]["perplexity"]["value"] == pytest.approx(figure["value"], rel=1e-5)
    with pytest.raises(UnsupportedError, match="gives no answers"):
        predict(run, "a ball")
    worst = read_errors(run.folder)["predictions"]
    assert worst[0]["source"]
    assert worst[0]["error"] >= worst[-1]["error"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_instruction_run_trains_evaluates_and_predicts(
    packing: bool, tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    losses: list[float] = []
    run = train(
        tree(tiny_decoder, glosses, tmp_path / "run", INSTRUCTION, packing=packing),
        listener=lambda event: losses.append(event.values["loss"]) if event.kind == "step" else None,
    )
    figures = run.manifest["metrics"]["test"]
    assert {"exact_match", "rouge1", "rouge2", "rougeL", "perplexity", "length"} == figures.keys()
    assert len(losses) == 3
    if not packing:
        result = predict(run, ["a short high fly ball", "fruit"])
        assert len(result["predictions"]) == 2
        assert all(isinstance(row["output"], str) for row in result["predictions"])
        found = evaluate(run, resamples=100)["metrics"]
        assert found["perplexity"]["value"] == pytest.approx(figures["perplexity"]["value"], rel=1e-5)


def test_packed_training_gives_equal_losses(tiny_decoder: Path, glosses: Path, tmp_path: Path) -> None:
    seen: dict[bool, list[float]] = {False: [], True: []}
    for packing, losses in seen.items():
        train(
            tree(tiny_decoder, glosses, tmp_path / str(packing), INSTRUCTION, packing=packing, compute_type="float32"),
            listener=lambda event, losses=losses: losses.append(event.values["loss"]) if event.kind == "step" else None,  # type: ignore[misc]
        )
    assert seen[True] == pytest.approx(seen[False], abs=1e-4)


def test_classification_run_on_causal_model_evaluates_and_predicts(
    tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    run = train(tree(tiny_decoder, glosses, tmp_path / "run", "classification"), listener=lambda event: None)
    accuracy = run.manifest["metrics"]["test"]["accuracy"]["value"]
    assert evaluate(run, resamples=100)["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)
    for split in ("test", "validation"):
        kept = read_errors(run.folder, split=split, everything=True)
        right = sum(row["true"] == row["predicted"] for row in kept["predictions"])
        assert (kept["rows"], right / 12) == (12, run.manifest["metrics"][split]["accuracy"]["value"])
    (answer,) = predict(run, "a short high fly ball")["predictions"]
    labels = {json.loads(line)["label"] for line in glosses.read_text(encoding="utf-8").splitlines()}
    assert answer["label"] in labels
    assert torch.tensor(list(answer["scores"].values())).sum() == pytest.approx(1)


@pytest.mark.parametrize(("tokens", "lengths", "lost"), [(8, [4, 4], 0), (9, [4, 4], 1), (10, [4, 4, 2], 0)])
def test_text_blocks_last_block_has_two_tokens_or_more(tokens: int, lengths: list[int], lost: int) -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(range(len(text))) for text in texts]}

    ((blocks, left_out),) = text_blocks(["x" * tokens], tokenizer, 4, (), (), cut=True)
    assert ([len(block) for block in blocks], left_out) == (lengths, lost)
