"""The fused LoRA path equals the plain one, in every combination, and keeps only what it says it keeps."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftwerk.kernels import flags as fast
from graftwerk.kernels.fused_lora import LoRALinear, apply_mask
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.dropout import DropoutGroup, dropout, mask_bits
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.adapted_module import adapt
from graftwerk.modeling.adapter_slots import ModelAdapters

INPUTS, OUTPUTS = 12, 10
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}],
    "dropout": [{"lora_dropout": 0.4}],
    "pissa": [{"init_lora_weights": "pissa"}],
    "pissa, dropout": [{"init_lora_weights": "pissa", "lora_dropout": 0.4}],
    "dora": [{"use_dora": True}],
    "dora, dropout": [{"use_dora": True, "lora_dropout": 0.4}],
    "two": [{}, {"r": 4}],
    "two, dropout": [{"lora_dropout": 0.4}, {"r": 4, "lora_dropout": 0.2}],
    "two, one with pissa": [{"init_lora_weights": "pissa"}, {"lora_dropout": 0.2}],
}


def layer_with(kind: str, settings: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer with adapters of generic weights, all active, in training mode."""
    torch.manual_seed(0)
    layer: Any = Conv1D(OUTPUTS, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, OUTPUTS, bias=kind != "no bias")
    layer = layer.to(dtype)
    if kind == "4 bit":
        layer = four_bit(64, 64)
    width = (64, 64) if kind == "4 bit" else (INPUTS, OUTPUTS)
    record = ModelAdapters(layer)
    names = [f"a{index}" for index in range(len(settings))]
    for name, values in zip(names, settings, strict=True):
        place = TargetModule("layer", Role.OTHER_LINEAR, *width, kind != "no bias")
        delta = LoRA(**{"r": 3, **values}).build_all([place], [layer])["layer"]
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        record.slots(layer).put(name, delta)
    layer.requires_grad_(False)
    for name in names:
        box = record.slots(layer)
        module = box.get(name)
        assert module is not None
        module.requires_grad_(True)
    adapt(layer, record.slots(layer))
    record.selection.choose(tuple(names))
    return layer.train()


def four_bit(inputs: int, outputs: int) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(inputs, outputs)
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    if getattr(layer.weight, "quant_state", None) is None:
        pytest.skip("bitsandbytes does not quantize on this CPU")
    assert isinstance(layer, nn.Module)
    return layer


def inputs_of(layer: nn.Module, form: str, dtype: torch.dtype = torch.float32) -> Tensor:
    width = int(layer.in_features) if hasattr(layer, "in_features") else INPUTS  # type: ignore[arg-type]
    torch.manual_seed(1)
    if form == "2-D":
        return torch.randn(6, width, dtype=dtype)
    if form == "turned":
        return torch.randn(width, 5, 3, dtype=dtype).permute(2, 1, 0)
    return torch.randn(3, 5, width, dtype=dtype)


def run(layer: nn.Module, x: Tensor, plain: bool, *, wanted: bool = True, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of x (where wanted), gradients of the adapters."""
    x = x.detach().requires_grad_(wanted)
    layer.zero_grad()
    torch.manual_seed(5)
    with fast.plain() if plain else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    assert all(grad is not None for grad in grads)
    return [y.detach(), *([x.grad] if wanted else []), *grads]  # type: ignore[list-item]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of the fused node."""
    calls: list[int] = []
    apply = LoRALinear.apply

    def counted(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(LoRALinear, "apply", counted)
    return calls


@pytest.mark.parametrize("form", ["3-D", "2-D", "turned"])
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d", "4 bit"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_fused_outputs_and_gradients_equal_plain(settings: str, kind: str, form: str, fused_calls: list[int]) -> None:
    if kind == "conv1d" and form == "turned":
        pytest.skip("Conv1D's own forward views its input, so the plain path takes none that is not contiguous")
    layer = layer_with(kind, SETTINGS[settings])
    x = inputs_of(layer, form)
    for wanted in (True, False):
        fused_calls.clear()
        expected = run(layer, x, plain=True, wanted=wanted)
        assert not fused_calls
        got = run(layer, x, plain=False, wanted=wanted)
        assert len(fused_calls) == (0 if kind == "4 bit" and "dora" in settings else 1)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_fused_under_autocast_equals_plain(settings: str, fused_calls: list[int]) -> None:
    layer = layer_with("bias", SETTINGS[settings])
    x = inputs_of(layer, "3-D")
    expected, got = run(layer, x, plain=True, autocast=True), run(layer, x, plain=False, autocast=True)
    assert len(fused_calls) == (0 if "dora" in settings else 1)
    exact = run(layer, x, plain=True)
    for mine, theirs, true in zip(got, expected, exact, strict=True):
        assert mine.dtype == theirs.dtype
        size = true.abs().max()
        assert (mine.float() - true).abs().max() <= 2 * (theirs.float() - true).abs().max() + 0.01 * size
        assert (mine.float() - theirs.float()).abs().max() <= 0.05 * size


def test_fused_half_precision_base_equals_plain() -> None:
    layer = layer_with("bias", SETTINGS["two, dropout"], torch.bfloat16)
    x = inputs_of(layer, "3-D", torch.bfloat16)
    for mine, theirs in zip(run(layer, x, plain=False), run(layer, x, plain=True), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


def test_fused_without_gradients_equals_plain() -> None:
    layer = layer_with("bias", SETTINGS["pissa"]).eval()
    x = inputs_of(layer, "3-D")
    with fast.plain():
        expected = layer(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), expected)


def test_fused_output_allows_in_place_change() -> None:
    layer = layer_with("bias", SETTINGS["lora"])
    x = inputs_of(layer, "3-D")
    layer(x.requires_grad_()).mul_(2).sum().backward()
    doubled = x.grad
    x.grad = None
    with fast.plain():
        (layer(x) * 2).sum().backward()
    torch.testing.assert_close(doubled, x.grad)


def test_fused_second_derivative_raises() -> None:
    layer = layer_with("bias", SETTINGS["lora"])
    x = inputs_of(layer, "2-D").requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_fused_deepcopy_is_independent() -> None:
    layer = layer_with("bias", SETTINGS["dropout"])
    twin = copy.deepcopy(layer)
    x = inputs_of(layer, "3-D")
    torch.testing.assert_close(run(layer, x, plain=False), run(twin, x, plain=False))


def kept_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the graph of layer(x) keeps, one tensor for each storage, parameters and buffers left out."""
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.grad_fn is not None
    return [tensor for address, tensor in found.items() if address not in own]


@pytest.mark.parametrize("kind", ["bias", "4 bit"])
def test_fused_saves_only_the_input(kind: str) -> None:
    layer = layer_with(kind, [{"lora_dropout": 0.4}])
    x = inputs_of(layer, "3-D").requires_grad_()
    large = [t for t in kept_by(layer, x) if t.numel() >= x.numel()]
    assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]
    with fast.plain():
        assert len([t for t in kept_by(layer, x) if t.numel() >= x.numel()]) > 1


# -- the mask --------------------------------------------------------------------------------------------------------


def test_mask_bits_have_probability_and_independence() -> None:
    rows, width, p = 2048, 1024, 0.1
    dropped = (mask_bits(3, p, rows, width, torch.device("cpu")) == 0).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(dropped.mean().item() - p) < 4 * deviation / math.sqrt(rows * width)
    unit = (dropped - p) / deviation
    for matrix in (unit, unit.T):
        # Of independent entries, products of two rows have mean 0 and standard deviation 1/sqrt(n); eight of them are
        # not seen in two million pairs.
        products = matrix @ matrix.T / matrix.shape[1]
        products.fill_diagonal_(0)
        spread = 1 / math.sqrt(matrix.shape[1])
        assert abs(products.std().item() / spread - 1) < 0.05
        assert products.abs().max() < 8 * spread


def test_mask_bits_rectangle_corners_are_independent() -> None:
    """Where a mask is made from rows and columns, four corners could determine each other."""
    rows, width, p = 512, 576, 0.1
    unit = ((mask_bits(5, p, rows, width, torch.device("cpu")) == 0).double() - p) / math.sqrt(p * (1 - p))
    generator = torch.Generator().manual_seed(0)
    (top, bottom), (left, right) = (torch.randint(0, most, (2, 400_000), generator=generator) for most in (rows, width))
    apart = (top != bottom) & (left != right)
    corners = (unit[top, left] * unit[top, right] * unit[bottom, left] * unit[bottom, right])[apart]
    assert abs(corners.mean().item()) < 4 / math.sqrt(len(corners))


@pytest.mark.parametrize("p", [0.001, 0.5, 0.999])
def test_mask_bits_any_probability_is_met(p: float) -> None:
    n = 1 << 20
    dropped = (mask_bits(1, p, 1024, 1024, torch.device("cpu")) == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_mask_is_equal_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(32, 24, dtype=dtype)
    bits = mask_bits(9, 0.25, 32, 24, x.device)
    torch.testing.assert_close(apply_mask(x, bits) / 0.75, dropout(x, 0.25, 9), rtol=1e-2, atol=1e-2)
    assert torch.equal(apply_mask(x, bits) == 0, dropout(x, 0.25, 9) == 0)


def test_dropout_group_shares_seed_and_repeats_it() -> None:
    x, group, first, second = torch.ones(2, 2), DropoutGroup(), object(), object()
    torch.manual_seed(0)
    seeds = [group.seed(x, reader) for reader in (first, second)]
    assert seeds[0] == seeds[1]
    torch.manual_seed(0)  # as gradient checkpointing does before it repeats a pass
    assert [group.seed(x, reader) for reader in (first, second)] == seeds
    assert DropoutGroup().seed(x, first) != seeds[0]
    assert group.seed(torch.ones(2, 2), object()) != seeds[0]  # another tensor, another mask


def test_dropout_in_evaluation_draws_nothing() -> None:
    layer = layer_with("bias", [{"lora_dropout": 0.4}]).eval()
    x = inputs_of(layer, "3-D")
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
