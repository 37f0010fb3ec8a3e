"""Weights that are no plain tensors (torchao, DTensor, FP8): the plain path, or a reason why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graftwerk as gw
from graftwerk.errors import UnsupportedError
from graftwerk.kernels.fused_lora import can_fuse
from graftwerk.modeling.attach import Adapter
from tests.contract.cases import method_of, perturb
from tests.families import FAMILIES

aten = torch.ops.aten
PATH = "model.layers.0.self_attn.q_proj"


class Codes(Tensor):
    """A weight of int8 codes and a scale for each row, which like torchao's knows few operations."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Codes:
        return Codes(inner["codes"], inner["scale"])

    def numbers(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return Codes(args[0].codes, args[0].scale)
        if func not in (aten.t.default, aten.mm.default, aten.addmm.default):
            raise NotImplementedError(f"{func} of codes")
        return func(*(arg.numbers() if isinstance(arg, Codes) else arg for arg in args), **(kwargs or {}))


def codes_of(weight: Tensor) -> Codes:
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return Codes((weight.detach() / scale).round().to(torch.int8), scale)


def float8_of(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float8_e4m3fn)


def model_with(weight: Any) -> tuple[Any, nn.Linear, dict[str, Tensor]]:
    model = FAMILIES["llama"].build()
    layer = model.get_submodule(PATH)
    layer.weight = nn.Parameter(weight(layer.weight), requires_grad=False)
    return model, layer, FAMILIES["llama"].batch()


def lora_on(model: Any, name: str = "lora") -> Adapter:
    torch.manual_seed(0)
    adapter = gw.attach(model, method_of(name).model_copy(update={"target_modules": (PATH,)}))
    perturb(adapter.parameters(), 3)
    return adapter


def test_lora_on_codes_takes_plain_path_and_equals_their_numbers() -> None:
    results = []
    for weight in (codes_of, lambda own: codes_of(own).numbers()):
        model, _, batch = model_with(weight)
        adapter = lora_on(model)
        logits = model(**batch).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {key: value.grad for key, value in adapter.named_parameters()}))
    torch.testing.assert_close(*results)


def test_can_fuse_float8_weight_is_false_under_autocast() -> None:
    """Its numbers are scaled by others; cast to the type of the products they would be taken as they are."""
    layer, x = nn.Linear(4, 3, bias=False).requires_grad_(False), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_fuse(layer, x)
        layer.weight = nn.Parameter(float8_of(layer.weight), requires_grad=False)
        assert not can_fuse(layer, x)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("weight", [codes_of, float8_of])
def test_merge_into_foreign_weight_raises_and_changes_nothing(weight: Any, in_place: bool) -> None:
    model, layer, _ = model_with(weight)
    before = layer.weight
    adapter = lora_on(model)
    with pytest.raises(UnsupportedError, match=r"cannot be merged into (Codes of float32|Parameter of float8_e4m3fn)"):
        adapter.merge(keep_base=not in_place)
    assert layer.weight is before


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_method_that_reads_foreign_weight_raises(name: str) -> None:
    with pytest.raises(UnsupportedError, match="Codes of float32, which cannot be read"):
        lora_on(model_with(codes_of)[0], name)
    with pytest.raises(UnsupportedError, match="float8_e4m3fn, which cannot be read"):
        lora_on(model_with(float8_of)[0], name)


def test_lora_on_torchao_weight_adds_its_update() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, layer, batch = model_with(lambda own: own.detach())
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    assert type(layer.weight) not in (Tensor, nn.Parameter)
    x = torch.randn(2, 5, layer.in_features)
    base = layer(x)
    adapter = lora_on(model)
    update = adapter.state_dict()
    a, b = (next(value for key, value in update.items() if part in key) for part in ("lora_A", "lora_B"))
    torch.testing.assert_close(layer(x), base + F.linear(F.linear(x, a), b) * 8.0)
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        adapter.merge()
