"""The room that virtual tokens leave for text, in every use of a model with a table of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.experiments.preflight import preflight
from graftwerk.training.train import train
from tests.tiny_text import gpt2_tokenizer

POSITIONS, VIRTUAL = 64, 20
METHODS = ("prompt", "ptuning", "prefix")


@pytest.fixture(scope="session")
def learnt_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 64 positions."""
    folder = tmp_path_factory.mktemp("gpt2-64")
    tokenizer = gpt2_tokenizer(folder)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tree(model: Path, folder: Path, method: str, task: Any, rows: list[dict[str, str]], **changes: Any) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.build(
        {
            "model": str(model),
            "task": task,
            "data": {"train": str(folder / "rows.jsonl"), "validation": 1, "max_truncated": 1},
            "method": {"name": method, "num_virtual_tokens": VIRTUAL},
            "training": {"max_steps": 2, "per_device_train_batch_size": 3, "report_to": ["jsonl"], "processes": 1},
            "evaluation": {"resamples": 100, "latency_batches": 1, "generate": False},
            "output_dir": str(folder / "run"),
        },
        changes,
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_train_max_length_leaves_room_for_virtual_tokens(
    method: str, packing: bool, learnt_positions: Path, tmp_path: Path
) -> None:
    if packing and method != "prefix":
        pytest.skip("a prompt cannot stand before each packed row")
    rows = [{"text": f"{at} " + "menu entry " * (3 + 20 * (at % 2))} for at in range(6)]
    run = train(tree(learnt_positions, tmp_path, method, "causal", rows, **{"training.packing": packing}))
    assert run.manifest["max_length"] == POSITIONS - VIRTUAL
    measured = evaluate(run, tmp_path / "rows.jsonl")
    assert measured["metrics"]["perplexity"]["value"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_predict_max_length_leaves_room_for_virtual_tokens(method: str, learnt_positions: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"open {at}", "completion": "yes"} for at in range(6)]
    task = {"name": "instruction", "template": "plain"}
    run = train(tree(learnt_positions, tmp_path, method, task, rows))
    asked = {"max_new_tokens": 30}
    (answer,) = predict(run, ["menu entry " * 20], evaluation=asked)["predictions"]
    assert isinstance(answer["output"], str)
    # A run of an earlier version, which kept all positions for text.
    (run.folder / "manifest.json").write_text(json.dumps({**run.manifest, "max_length": POSITIONS}))
    said = predict(run.folder, ["menu entry " * 20], evaluation=asked)["notes"]
    assert f"1 of 1 rows were cut to {POSITIONS - VIRTUAL} tokens" in said


@pytest.mark.parametrize("method", METHODS)
def test_preflight_refuses_text_longer_than_virtual_tokens_leave(
    method: str, learnt_positions: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"menu {at}"} for at in range(6)]
    with pytest.raises(ConfigError, match="more than the 64 positions") as caught:
        preflight(tree(learnt_positions, tmp_path, method, "causal", rows, **{"data.max_length": 45}))
    assert "at most 44" in str(caught.value.hint)
    preflight(tree(learnt_positions, tmp_path, method, "causal", rows, **{"data.max_length": 44}))
    with pytest.raises(ConfigError, match="leave no room"):
        preflight(tree(learnt_positions, tmp_path, method, "causal", rows, **{"method.num_virtual_tokens": 64}))


def test_prefix_of_an_encoder_takes_no_positions(tiny_encoder: Path, glosses: Path, tmp_path: Path) -> None:
    config = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "max_truncated": 1, "max_length": 64, "allow": "all"},
        "method": {"name": "prefix", "num_virtual_tokens": VIRTUAL},
        "output_dir": str(tmp_path / "run"),
    }
    assert preflight(RunConfig.build(config))["model"]["max_length"] == 64
