"""What is said of a run before a model is loaded is what the run then does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, DataError, UnsupportedError
from graftwerk.experiments.preflight import count_parameters, preflight
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.modeling.attach import attach_from_tensors
from graftwerk.models.load import load_config
from graftwerk.tasks.base import Example, Splits
from graftwerk.tasks.classification import Classification
from graftwerk.training.data_summary import _lengths, _lengths_counted
from tests.cli.commands import run_file

SPLITS = Splits([], [], [], ("a", "b", "c"), "x")
VARIANTS: list[Any] = [
    *METHODS,
    *SHORTHANDS,
    {"name": "prefix", "prefix_projection": True},
    {"name": "ptuning", "encoder_reparameterization_type": "LSTM"},
    {"name": "lora", "target_modules": "attention", "r": 3},
]


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_count_parameters_equals_attached_method(method: Any, kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{kind}")
    task, settings = Classification(), parse_method(method)
    config = load_config(str(folder))
    if (kind, settings.name) == ("decoder", "bitfit"):
        with pytest.raises(UnsupportedError, match="biases"):
            count_parameters(settings, task, config, SPLITS)
        return
    counted = count_parameters(settings, task, config, SPLITS)
    config = load_config(str(folder))
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    graft = attach_from_tensors(task.auto_class().from_config(config), settings, "default", None)
    assert counted["head"] == graft.num_head_parameters > 0
    assert counted["trained"] == graft.num_parameters + graft.num_head_parameters
    assert counted["total"] == graft.num_base_parameters
    assert counted["share"] == pytest.approx(counted["trained"] / counted["total"])


def test_preflight_describes_run_without_loading_model(
    tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("graftwerk.models.load.load_model", refuse)
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    config = RunConfig.load(run_file(tmp_path, tiny_encoder, glosses, training=training))
    said = preflight(config)
    assert said["data"]["rows"] == {"train": 168, "validation": 36, "test": 36}
    assert (said["rows_per_step"], said["steps_per_epoch"], said["steps"]) == (24, 7, 14)
    assert said["learning_rate"] == METHODS["lora"].default_learning_rate
    assert said["model"]["max_length"] == 64
    assert len(said["data"]["labels"]) == 12
    assert sum(counts["train"] for counts in said["data"]["labels"].values()) == 168
    batch = said["first_batch"]
    assert batch["shape"][0] == len(batch["rows"]) == 8
    for row in batch["rows"]:
        assert (row["tokens"][0], row["tokens"][-1]) == ("[CLS]", "[SEP]")
        assert len(row["tokens"]) + row["padding"] == batch["shape"][1]
        assert row["label"] in said["data"]["labels"]
    lengths = said["data"]["lengths"]["train"]
    assert 0 < lengths["median"] <= lengths["p95"] <= lengths["longest"] < lengths["tokens"]
    assert said["output_dir"]["exists"] is False
    assert not (tmp_path / "run").exists()


def test_preflight_raises_what_training_would(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> None:
    def with_data(**changes: Any) -> RunConfig:
        data = {"train": str(glosses), "validation": 36, **changes}
        return RunConfig.load(run_file(tmp_path, tiny_encoder, glosses, data=data))

    with pytest.raises(DataError, match="longer than 8 tokens"):
        preflight(with_data(max_length=8))
    with pytest.raises(ConfigError, match="more than the 64 positions"):
        preflight(with_data(max_length=65))
    cut = preflight(with_data(max_length=8, max_truncated=1.0))
    assert cut["data"]["truncated"]["train"] > 100
    assert any(finding["code"] == "truncated" for finding in cut["findings"])
    method = {"name": "lora", "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match="q_proj"):
        preflight(RunConfig.load(run_file(tmp_path, tiny_encoder, glosses, method=method)))


def test_preflight_counts_augmented_rows_in_steps(tiny_encoder: Path, glosses: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text("".join(glosses.read_text(encoding="utf-8").splitlines(keepends=True)[:10]))
    path = run_file(
        tmp_path,
        tiny_encoder,
        glosses,
        training={"num_train_epochs": 1, "per_device_train_batch_size": 8},
        data={
            "train": str(glosses),
            "validation": 40,
            "augment": [
                {"name": "word_shuffle", "n": 2, "weight": 0.5},
                {"name": "file", "path": str(more), "weight": 3},
            ],
        },
    )
    checked = preflight(RunConfig.load(path))
    assert checked["data"]["rows"]["train"] == 200
    assert checked["data"]["augmented_at_most"] == 200 + 30
    assert checked["steps"] == (200 + 230 + 7) // 8
    plain = preflight(RunConfig.load(path, {"data.augment": []}))
    assert (plain["steps"], plain["data"]["augmented_at_most"]) == (25, None)


def test_preflight_plan_grows_with_steps_rows_and_trained_parameters(
    tmp_path: Path, tiny_encoder: Path, glosses: Path
) -> None:
    def planned(method: str = "lora", **training: Any) -> tuple[float, int]:
        path = run_file(tmp_path, tiny_encoder, glosses, method=method, training=training)
        plan = preflight(RunConfig.load(path))["plan"]
        return plan["time"]["training_seconds"], plan["memory"]["least_peak_bytes"]

    once, often = planned(num_train_epochs=1), planned(num_train_epochs=10)
    assert 8 < often[0] / once[0] < 12
    assert once[1] == often[1]
    assert planned("full")[1] > once[1]
    assert planned(per_device_train_batch_size=160)[1] > 2 * once[1]


def test_lengths_are_those_before_truncation_in_memory_and_streamed() -> None:
    rows = [Example({"input_ids": [1] * min(length, 60)}, 0, max(0, length - 60)) for length in range(1, 101)]
    wanted = {"median": 50, "p95": 95, "longest": 100, "tokens": 5050}
    assert _lengths(rows) == _lengths_counted(Counter(range(1, 101))) == wanted
