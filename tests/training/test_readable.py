"""A run whose files could not be read again is refused before it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftwerk.errors import ConfigError
from graftwerk.evaluation.evaluate import predict
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.train import train


def rows_of(folder: Path, labels: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {n}", "label": label}) + "\n" for n, label in enumerate(labels)))
    return path


@pytest.mark.parametrize("kind", ["names", "escapes", "run file", "run file of long lines"])
def test_train_unreadable_output_raises_before_training(tmp_path: Path, tiny_encoder: Path, kind: str) -> None:
    labels = {
        "names": ["class " + "n" * 250 + str(n) for n in range(2_500)],
        "escapes": [f'"{n}"\\' for n in range(4_000)],
    }
    rows = rows_of(tmp_path, labels.get(kind, ["a", "b"] * 20))
    wanted = {"run file": [f"word {n}" for n in range(40_000)], "run file of long lines": ["n" * 20_000] * 40}
    tree = {
        "model": str(tiny_encoder),
        "data": {
            "train": str(rows),
            "validation": None,
            "allow": ["all"],
            "filter": {"label": ["a", "b", *wanted[kind]]},
        }
        if kind in wanted
        else {"train": str(rows), "validation": None, "allow": ["all"]},
        "method": "lora",
        "training": {"max_steps": 1, "processes": 1, "report_to": ["jsonl"]},
        "output_dir": str(tmp_path / "run"),
    }
    seen: list[str] = []
    with pytest.raises(ConfigError, match=r"read again|most that"):
        train(tree, listener=lambda event: seen.append(event.kind))
    assert "step" not in seen
    assert not (tmp_path / "run" / "adapter").exists()


def test_train_labels_outside_ascii_are_stored_and_read(tmp_path: Path, tiny_encoder: Path) -> None:
    """Written as \\uXXXX they would be six times as long, and more escapes than are read."""
    labels = [f"綱目分類名稱第{n}號類別" for n in range(1_500)]
    tree = {
        "model": str(tiny_encoder),
        "data": {"train": str(rows_of(tmp_path, labels)), "validation": None, "allow": ["all"]},
        "method": "lora",
        "training": {"max_steps": 1, "processes": 1, "report_to": ["jsonl"], "save_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    done = train(tree)
    assert predict(done, ["word 1"])["predictions"][0]["label"] in labels
    assert Checkpoints(done.folder / "checkpoints").load_latest() is not None
