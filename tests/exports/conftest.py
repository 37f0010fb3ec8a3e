"""Adapter folders as a run leaves them, without the run: drawn parameters, and task and labels named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftwerk as gw
from graftwerk.methods.registry import parse_method
from graftwerk.models.load import load_config, load_model, load_tokenizer
from graftwerk.models.positions import fix_padding
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.splits import Splits

Make = Callable[..., Path]
LABELS = ("animal", "food", "tool")


def stir(adapter: Any, scale: float) -> None:
    """Draw an adapter's parameters, so that its answers are not the base's."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, tensor in adapter.state_dict().items():
            if tensor.is_floating_point() and "start_" not in key:
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * scale)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Make:
    def make(base: Path, method: Any, task: Any, name: str = "default", scale: float = 0.1) -> Path:
        torch.manual_seed(0)
        bound = parse_task(task).for_model(load_config(str(base)))
        labels = ("score",) if bound.name == "regression" else LABELS if bound.has_head else None
        splits = Splits((), (), (), labels, "")
        model = load_model(str(base), bound, splits)
        fix_padding(model, load_tokenizer(str(base)))
        adapter = gw.attach(model, parse_method(method), name)
        stir(adapter, scale)
        metadata = {
            "model": str(base),
            "task": bound.name,
            "task_settings": {"name": bound.name, **json.loads(bound.model_dump_json())},
            "labels": labels and list(labels),
            "max_length": 48,
        }
        return gw.save(adapter, tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}", metadata=metadata)

    return make


@pytest.fixture
def labelled(tmp_path: Path, glosses: Path) -> str:
    """24 rows with the labels of `make_adapter`."""
    path = tmp_path / "labelled.jsonl"
    texts = [json.loads(line)["text"] for line in glosses.read_text(encoding="utf-8").splitlines()][:24]
    rows = [{"text": text, "label": LABELS[place % 3]} for place, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
