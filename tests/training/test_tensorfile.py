"""What is written is a safetensors file to everybody who reads such files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftwerk.serialization.untrusted_files import DTYPES, read_tensors
from graftwerk.training.tensorfile import write_tensors

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "part": torch.arange(10, dtype=torch.int64)[2:7:2],
    "number": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "trained": torch.nn.Parameter(torch.ones(3)),
}


def test_write_tensors_is_read_by_safetensors(tmp_path: Path) -> None:
    digest = write_tensors(tmp_path / "a.safetensors", TENSORS)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    for read in (load_file(tmp_path / "a.safetensors"), read_tensors(tmp_path / "a.safetensors")):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_write_tensors_writes_every_readable_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0], dtype=torch.uint8).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"a": tensor})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"].float(), tensor.float())


def test_write_tensors_ignores_order_of_names(tmp_path: Path) -> None:
    one = write_tensors(tmp_path / "a", TENSORS)
    assert write_tensors(tmp_path / "b", dict(reversed(TENSORS.items()))) == one


def test_write_tensors_aligns_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == TENSORS.keys()


def test_write_tensors_existing_file_raises(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", TENSORS)
