"""Adapters in several files: read by their index, and refused where it says something else than the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, GraftwerkError, IntegrityError
from graftwerk.inspection.adapter import describe_adapter
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter, read_adapter_config, save_adapter
from graftwerk.serialization.weight_files import INDEX_FILE, read_headers
from tests.families import FAMILIES

LLAMA = FAMILIES["llama"]
PARTS = [f"adapter_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder of PEFT's, its tensors dealt out to three files."""
    model = LLAMA.build()
    graft = gw.attach(model, parse_method({"name": "lora", "r": 2}))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_adapter(graft, tmp_path)
    torch.save(model(**LLAMA.batch()).logits, tmp_path / "expected")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    places = {key: PARTS[number % 3] for number, key in enumerate(tensors)}
    for part in PARTS:
        save_file({key: tensor for key, tensor in tensors.items() if places[key] == part}, tmp_path / part)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for name in ("adapter_model.safetensors", "graftwerk.json"):
        (tmp_path / name).unlink()
    return tmp_path


def test_load_adapter_sharded_gives_equal_outputs(folder: Path) -> None:
    model = LLAMA.build()
    load_adapter(model, folder)
    torch.testing.assert_close(model(**LLAMA.batch()).logits, torch.load(folder / "expected"))
    described = describe_adapter(folder)
    assert described["bytes"] == sum((folder / part).stat().st_size for part in PARTS)
    assert len(read_headers(read_adapter_config(folder))) == 28


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        change(index)
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return edit


def swap(index: dict[str, Any]) -> None:
    first, second, *_ = index["weight_map"]
    index["weight_map"].update({first: PARTS[1], second: PARTS[0]})


@pytest.mark.parametrize(
    ("error", "match", "damage"),
    [
        (AdapterError, "00002-of-00003", lambda folder: (folder / PARTS[1]).unlink()),
        (AdapterError, "missing: other", edited(lambda index: index["weight_map"].update(other=PARTS[0]))),
        (IntegrityError, "does not place", edited(swap)),
        (IntegrityError, "no safetensors file", edited(lambda index: index["weight_map"].update(a="../x.safetensors"))),
        (IntegrityError, "no safetensors file", edited(lambda index: index["weight_map"].update(a="part.bin"))),
        (IntegrityError, "weight_map", edited(lambda index: index.pop("weight_map"))),
        (IntegrityError, "weight_map", edited(lambda index: index.update(weight_map={"a": 1}))),
    ],
)
def test_load_adapter_index_that_contradicts_files_raises(
    error: type[GraftwerkError], match: str, damage: Callable[[Path], None], folder: Path
) -> None:
    damage(folder)
    with pytest.raises(error, match=match):
        load_adapter(LLAMA.build(), folder)


def test_load_adapter_prefers_single_file_to_index(folder: Path) -> None:
    tensors = {key: tensor for part in PARTS for key, tensor in load_file(folder / part).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / INDEX_FILE).write_text("{}")
    load_adapter(LLAMA.build(), folder)
