"""The tables of known modules say what the classes do: each entry is built and held against its formula."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graftwerk.kernels import memory_efficient
from graftwerk.kernels.memory_efficient import FAMILIES, GATED_MLPS, OFFSET_FAMILIES, RMS_NORMS

WIDTH = 8


def class_of(name: str) -> Any | None:
    family, _, cls = name.partition(".")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, cls, None)


@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_rms_norm_of_table_follows_its_formula(name: str) -> None:
    cls = class_of(name)
    if cls is None:
        assert name.partition(".")[0] in FAMILIES  # a family with layer norms: the entry matches nothing
        return
    norm = cls(WIDTH, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH))
    x = torch.randn(3, WIDTH)
    factor = norm.weight + 1 if name.partition(".")[0] in OFFSET_FAMILIES else norm.weight
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * factor
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)
    assert memory_efficient.efficient_mixin(norm) is memory_efficient.MemoryEfficientRMSNorm


@pytest.mark.parametrize("name", sorted(GATED_MLPS))
def test_gated_mlp_of_table_follows_its_formula(name: str) -> None:
    cls = class_of(name)
    if cls is None:
        assert name.partition(".")[0] in FAMILIES
        return

    class Parts(nn.Module):
        forward = cls.forward

    block: Any = Parts()
    block.gate_proj, block.up_proj, block.down_proj = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
    block.act_fn, block.config = nn.SiLU(), SimpleNamespace(pretraining_tp=1)
    x = torch.randn(3, WIDTH)
    expected = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
    torch.testing.assert_close(block(x), expected)


def test_tables_name_classes_that_exist() -> None:
    assert sum(class_of(name) is not None for name in RMS_NORMS) >= 35
    assert sum(class_of(name) is not None for name in GATED_MLPS) >= 28
