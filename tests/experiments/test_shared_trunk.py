"""Runs of a comparison on the same layers share what the frozen layers below give, whatever their method and seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.compare import compare
from tests.experiments.here import InThisProcess

METHODS: list[Any] = [
    {"label": "lora", "name": "lora", "r": 2, "layers": "top-1"},
    {"label": "bottleneck", "name": "bottleneck", "layers": [1]},
    "probe",
    "full",
]


def test_compare_runs_share_activation_cache(
    tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    model = tmp_path / "without-dropout"
    shutil.copytree(tiny_encoder, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {
        "model": str(model),
        "data": {"train": str(glosses), "validation": 24, "test": 48, "max_train_rows": 48},
        "training": {"num_train_epochs": 1, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1, "resamples": 100},
        "output_dir": str(tmp_path / "cmp"),
    }
    comparison = compare(settings, METHODS, [0, 1], report=False, quiet=True)
    used: dict[str, tuple[bool, bool | None]] = {}
    for name in ("lora", "bottleneck", "probe", "full"):
        for seed in (0, 1):
            manifest = json.loads((comparison.folder / f"{name}-seed{seed}" / "manifest.json").read_text())
            used[f"{name}{seed}"] = (manifest["trunk"]["on"], manifest["trunk"].get("reused"))
    assert used == {
        "lora0": (True, False), "bottleneck0": (True, True), "probe0": (True, False), "full0": (False, None),
        "lora1": (True, True), "bottleneck1": (True, True), "probe1": (True, True), "full1": (False, None),
    }  # fmt: skip
    assert not (comparison.folder / "trunk").exists()
