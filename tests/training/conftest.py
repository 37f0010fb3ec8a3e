"""A tiny run: a BERT with random weights and 36 WordNet glosses, trained in about a second."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import RunInterrupted
from graftwerk.training.events import Event
from graftwerk.training.train import train

Tree = dict[str, Any]


def _tree(model: Path, data: Path, output_dir: Path, method: Any = "lora", **training: Any) -> Tree:
    return {
        "model": str(model),
        "data": {
            "train": str(data),
            "columns": {"text": "text", "label": "label"},
            "filter": {"label": ["noun.act", "noun.animal", "noun.food"]},
            "max_train_rows": 36,
            "validation": 12,
            "test": 12,
            "max_length": 24,
            "max_truncated": 1.0,
        },
        "method": method,
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-2,
            "eval_steps": 4,
            "logging_steps": 1,
            "report_to": ["jsonl"],
            **training,
        },
        "evaluation": {"resamples": 100},
        "output_dir": str(output_dir),
    }


@pytest.fixture
def run_file(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> Callable[..., Tree]:
    """A run file as a mapping: 12 steps of 6 rows, evaluated and saved every 4; keyword arguments are `training`
    settings.
    """

    def build(output_dir: Path | str = tmp_path / "run", *, method: Any = "lora", **training: Any) -> Tree:
        return _tree(tiny_encoder, glosses, Path(output_dir), method, **training)

    return build


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path) -> Path:
    """The same run, stopped by SIGTERM after 9 of its 12 steps. Copy it, do not go on in it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 9):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        train(_tree(tiny_encoder, glosses, folder), listener=stop)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path) -> Path:
    """The same run from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(_tree(tiny_encoder, glosses, folder))
    return folder


@pytest.fixture
def still(tmp_path: Path, tiny_encoder: Path) -> Path:
    """The tiny model without dropout: two processes draw other masks than one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
