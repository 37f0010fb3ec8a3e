"""Weights that are no plain tensors (torchao, DTensor, FP8): the plain path, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

import graftwerk as gw
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.kernels import flags
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


@pytest.mark.parametrize("weight", [codes_of, float8_of])
def test_training_or_copying_foreign_weights_raises_and_leaves_the_model(weight: Any) -> None:
    model, _, _ = model_with(weight)
    kind = r"\((Codes of float32|Parameter of float8_e4m3fn)\)"
    with pytest.raises(UnsupportedError, match=rf"{PATH}.weight is quantized {kind}"):
        gw.attach(model, method_of("full"))
    saved = method_of("lora").model_copy(update={"modules_to_save": ("layers.0.self_attn",)})
    with pytest.raises(UnsupportedError, match=rf"self_attn` is quantized, .* can be trained {kind}"):
        gw.attach(model, saved)
    assert gw.adapters(model) == {}
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(weight(embedding.weight), requires_grad=False)
    with pytest.raises((ConfigError, UnsupportedError), match="its weight is quantized"):
        gw.attach(model, method_of("lora tokens"))


def test_saved_module_with_a_replaced_forward_raises() -> None:
    """Its copy would call the forward that belongs to the base's module."""
    model = FAMILIES["llama"].build()
    layer = model.get_submodule(PATH)
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    method = method_of("lora").model_copy(update={"target_modules": ("down_proj",), "modules_to_save": ("self_attn",)})
    with pytest.raises(UnsupportedError, match="a copy would run the base's own"):
        gw.attach(model, method)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def distributed(adapter: Adapter, mesh: DeviceMesh) -> None:
    """Make the layer's weight, its adapter and its input DTensors."""
    distribute_module(
        adapter.model.get_submodule(PATH),
        mesh,
        input_fn=lambda _, args, mesh: (DTensor.from_local(args[0], mesh, [Replicate()]),),  # type: ignore[arg-type]
        output_fn=lambda _, y, mesh: y.to_local(),  # type: ignore[arg-type]
    )


def sharded(adapter: Adapter, mesh: DeviceMesh) -> None:
    """Shard the base by FSDP2, as training does; the adapter stays whole."""
    own = set(adapter.parameters())
    for layer in adapter.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=own)
    fully_shard(adapter.model, mesh=mesh, ignored_params=own)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(adapter: Adapter, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = adapter.model(**batch).logits
    logits.square().mean().backward()
    return whole(logits.detach()), {key: whole(value.grad) for key, value in adapter.named_parameters()}


@pytest.mark.parametrize(("name", "spread"), [("lora", distributed), ("lora", sharded), ("dora", sharded)])
def test_adapter_on_dtensors_equals_plain_path_and_is_not_merged(
    name: str, spread: Callable[[Adapter, DeviceMesh], None], mesh: DeviceMesh
) -> None:
    model, _, batch = model_with(lambda own: own.detach())
    with flags.plain():
        expected = results(lora_on(model, name), batch)
    model, layer, _ = model_with(lambda own: own.detach())
    adapter = lora_on(model, name)
    spread(adapter, mesh)
    assert isinstance(layer.weight, DTensor)
    assert not can_fuse(layer, torch.ones(2, layer.in_features))
    torch.testing.assert_close(results(adapter, batch), expected)
    with pytest.raises(UnsupportedError, match="cannot be merged into DTensor of float32"):
        adapter.merge()


def test_dora_on_weight_distributed_later_raises_in_its_pass(mesh: DeviceMesh) -> None:
    model, _, batch = model_with(lambda own: own.detach())
    distributed(lora_on(model, "dora"), mesh)
    with pytest.raises(UnsupportedError, match="DTensor of float32, which cannot be read"):
        model(**batch)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_attach_to_layer_cut_by_tensor_parallelism_raises(name: str, mesh: DeviceMesh) -> None:
    model, layer, batch = model_with(lambda own: own.detach())
    with torch.no_grad():
        expected = model(**batch).logits
    parallelize_module(model, mesh, {PATH: ColwiseParallel()})
    assert isinstance(layer.weight, DTensor)
    with pytest.raises(UnsupportedError, match="DTensor of float32"):
        lora_on(model, name)
    assert gw.adapters(model) == {}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)


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
