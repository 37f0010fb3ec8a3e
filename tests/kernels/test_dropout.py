"""Dropout off the CPU, where the device draws the mask in bytes, tried on the CPU: the seam is one function.

The hashed mask's own distribution is tested in `test_fused_lora.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graftwerk.kernels import flags
from graftwerk.kernels.fused_lora import apply_mask, apply_mask_
from graftwerk.methods import dropout as seam
from graftwerk.methods.dropout import dropout, mask_bits
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.attach import attach
from tests.families import FAMILIES
from tests.kernels.test_fused_lora import SETTINGS, inputs_of, layer_with, run
from tests.training.test_trainer import Bench, losses

ROWS, WIDTH = 64, 512
CPU = torch.device("cpu")


@pytest.fixture
def off_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw masks as on an accelerator."""
    monkeypatch.setattr(seam, "is_hashed", lambda device: False)


class Traffic(TorchDispatchMode):
    """Count kernels that work on whole matrices, and the bytes that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliased = func._schema.returns and func._schema.returns[0].alias_info
        if (aliased and not aliased.is_write) or func in (
            torch.ops.aten.empty.memory_format,
            torch.ops.aten.detach.default,
        ):
            return out
        read = [one for one in args if isinstance(one, Tensor)]
        if func.__name__.startswith(("bernoulli_", "random_")):
            read = []
        written = [one for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, Tensor)]
        if any(one.numel() >= ROWS * WIDTH for one in written):
            self.kernels += 1
            self.bytes += sum(one.numel() * one.element_size() for one in (*read, *written))
        return out

    def per_element(self) -> tuple[int, float]:
        return self.kernels, round(self.bytes / (ROWS * WIDTH), 1)


def test_mask_off_the_cpu_has_its_probability_and_is_drawn_again(off_cpu: None) -> None:
    n = 1 << 20
    for p in (0.001, 0.1, 0.5, 0.999):
        keep = mask_bits(3, p, 1024, 1024, CPU)
        assert keep.dtype == torch.bool
        assert abs(1 - keep.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(mask_bits(3, 0.1, 64, 64, CPU), mask_bits(3, 0.1, 64, 64, CPU))
    assert not torch.equal(mask_bits(3, 0.1, 64, 64, CPU), mask_bits(4, 0.1, 64, 64, CPU))
    state = torch.get_rng_state()
    mask_bits(3, 0.1, 64, 64, CPU)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_off_the_cpu_is_the_same_mask_in_every_path_and_in_backward(dtype: torch.dtype, off_cpu: None) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_()
    y = dropout(x, 0.25, 9)
    y.sum().backward()
    bits = mask_bits(9, 0.25, ROWS, WIDTH, CPU)
    assert x.grad is not None
    assert torch.equal(x.grad != 0, bits)
    assert torch.equal(y != 0, bits & (x != 0))
    torch.testing.assert_close(apply_mask(x.detach(), bits) / 0.75, y.detach(), rtol=1e-2, atol=1e-2)
    assert torch.equal(apply_mask_(x.detach().clone(), bits), apply_mask(x.detach(), bits))
    kept = y.detach().double()[bits].div(x.detach().double()[bits])
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75), rtol=1e-2, atol=0)


@pytest.mark.parametrize("settings", [name for name in SETTINGS if "dropout" in name])
def test_fused_off_the_cpu_equals_plain(settings: str, off_cpu: None) -> None:
    layer = layer_with("bias", SETTINGS[settings])
    x = inputs_of(layer, "3-D")
    for fused, plain in zip(run(layer, x, False), run(layer, x, True), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_fused_off_the_cpu_keeps_no_mask(off_cpu: None) -> None:
    """Masks are drawn again in backward: a layer keeps its input and thin matrices."""
    layer = layer_with("bias", [{"lora_dropout": 0.4}])
    x = inputs_of(layer, "3-D").requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        layer(x)
    assert not any(tensor.dtype == torch.bool for tensor in kept)


def test_gradients_off_the_cpu_under_checkpointing_are_those_without(off_cpu: None) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = FAMILIES["llama"].build(classifier=False)
        adapter = attach(model, LoRA(r=2, lora_dropout=0.3))
        for parameter in adapter.parameters():
            parameter.data.add_(0.1)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        batch = FAMILIES["llama"].batch(padded=False)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_resume_off_the_cpu_is_bit_exact(fused: bool, tmp_path: Path, off_cpu: None) -> None:
    bench, method = Bench(), {"name": "lora", "lora_dropout": 0.3}
    settings: dict[str, Any] = {"method": method, "save_steps": 2, "max_steps": 4, "validation": False}
    with flags.plain() if not fused else torch.enable_grad():
        whole = bench.trainer(tmp_path / "whole", **settings)
        expected = losses(whole)
        snapshot = whole.checkpoints.load(2)
        resumed = bench.trainer(tmp_path / "resumed", **settings)
        resumed.restore(snapshot)
        assert losses(resumed) == expected[2:]
    ours, theirs = whole.adapter.state_dict(), resumed.adapter.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def traffic(work: Any) -> tuple[int, float]:
    with Traffic() as counted:
        work()
    return counted.per_element()


def measured(dtype: torch.dtype) -> dict[str, tuple[int, float]]:
    """Kernels, and bytes an element, of a mask and of dropout."""
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    return {
        "mask": traffic(lambda: mask_bits(1, 0.1, ROWS, WIDTH, CPU)),
        "mask, applied": traffic(lambda: apply_mask(x, mask_bits(1, 0.1, ROWS, WIDTH, CPU))),
        "plain path": traffic(lambda: dropout(x, 0.1, 1)),
    }


def test_traffic_off_the_cpu_is_a_byte_an_element_for_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/accelerators.md, section Dropout."""
    hashed = {dtype: measured(dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(seam, "is_hashed", lambda device: False)
    drawn = {dtype: measured(dtype) for dtype in (torch.float32, torch.bfloat16)}
    text = (Path(__file__).parents[2] / "docs" / "accelerators.md").read_text()
    for name in hashed[torch.float32]:
        cells = [
            f"{kernels} / {size:g}"
            for kinds in (hashed, drawn)
            for kernels, size in (kinds[torch.float32][name], kinds[torch.bfloat16][name])
        ]
        line = f"| {name} | {' | '.join(cells)} |"
        assert line in text, line
    assert drawn[torch.float32]["mask"] == drawn[torch.bfloat16]["mask"] == (1, 1.0)
    assert drawn[torch.float32]["mask, applied"] == (2, 1 + 4 + 1 + 4)
