"""Adapters on models that other libraries, types, devices and modes have been at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwerk.modeling.attach as gw
from graftwerk.errors import UnsupportedError
from graftwerk.methods import dora
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.lora import LoRA
from graftwerk.methods.registry import parse_method
from tests.contract.cases import METHODS, model_and_batch, perturb
from tests.families import FAMILIES


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
        return logits


def adapted(model: Any, *names: str, **settings: Any) -> list[gw.Adapter]:
    grafts = []
    for number, name in enumerate(names):
        grafts.append(gw.attach(model, parse_method(settings or METHODS["lora"]), name=name))
        perturb(grafts[-1].parameters(), 7 + number, scale=0.1)
    return grafts


# -- accelerate's hooks and others' forwards


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "houlsby", "ia3"])
def test_attach_under_accelerate_hooks_equals_unhooked_and_keeps_hooks(method: str, family: str) -> None:
    from accelerate import dispatch_model

    plain, batch = model_and_batch("lora", family)
    hooked, _ = model_and_batch("lora", family)
    hooked = dispatch_model(hooked, {"": "cpu"}, force_hooks=True, main_device="cpu")
    bare = answers(hooked, batch)
    for model in (plain, hooked):
        torch.manual_seed(3)
        adapted(model, "a", **METHODS[method])
    assert not torch.allclose(answers(plain, batch), bare)
    torch.testing.assert_close(answers(hooked, batch), answers(plain, batch))
    hooked.train()
    hooked(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in gw.adapters(hooked)["a"].parameters())
    hooked.eval()
    gw.detach(hooked)
    assert torch.equal(answers(hooked, batch), bare)


@pytest.mark.parametrize("attached_first", [False, True])
def test_attach_after_removed_hooks_works(attached_first: bool) -> None:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    plain, batch = model_and_batch("lora", "bert")
    bare = answers(plain, batch)
    torch.manual_seed(3)
    adapted(plain, "a")
    model, _ = model_and_batch("lora", "bert")
    if attached_first:
        torch.manual_seed(3)
        adapted(model, "a")
    dispatch_model(model, {"": "cpu"}, force_hooks=True, main_device="cpu")
    remove_hook_from_submodules(model)
    if not attached_first:
        torch.manual_seed(3)
        adapted(model, "a")
    torch.testing.assert_close(answers(model, batch), answers(plain, batch))
    gw.detach(model)
    assert torch.equal(answers(model, batch), bare)


def test_attach_replaced_forward_raises() -> None:
    model, _ = model_and_batch("lora", "llama")
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    with pytest.raises(UnsupportedError, match="has been replaced on the object"):
        adapted(model, "a")


def test_adapted_layer_and_norm_accept_keywords() -> None:
    model, _ = model_and_batch("lora", "llama")
    (graft,) = adapted(model, "a")
    layer, norm = model.get_submodule(graft.hosts[0]), model.model.norm
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(norm(hidden_states=x), norm(x))


def test_rms_norm_without_eps_equals_plain() -> None:
    model, batch = model_and_batch("lora", "llama")
    model.model.norm = nn.RMSNorm(model.config.hidden_size)
    before = answers(model, batch)
    gw.attach(model, parse_method("lora"))
    torch.testing.assert_close(model(**batch).logits.detach(), before)


# -- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_head_on_half_precision_base_trains_in_float32(family: str, dtype: torch.dtype) -> None:
    model, batch = model_and_batch("lora", family)
    from tests.families import FAMILIES

    model = FAMILIES[family].build(classifier=True).to(dtype)
    adapted(model, "a", "b")
    gw.activate(model, "a")
    one = answers(model, batch)
    assert one.dtype == dtype
    gw.activate(model, rows=["a", "b", None])
    mixed = answers(model, batch)
    torch.testing.assert_close(mixed[0], one[0], atol=2e-2, rtol=2e-2)
    gw.activate(model, "a")
    model(**batch).logits.float().sum().backward()
    assert all(parameter.dtype == torch.float32 for parameter in gw.adapters(model)["a"].parameters())


def eight_bits() -> tuple[nn.Module, Tensor]:
    """A layer as bitsandbytes quantizes it, after its first pass, and what it was made of."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    layer = bnb.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    layer(torch.randn(2, 16, dtype=torch.float16))
    assert layer.weight.dtype == torch.int8
    return layer, weight


def test_base_weight_8_bit_is_dequantized() -> None:
    layer, weight = eight_bits()
    torch.testing.assert_close(base_weight(layer), weight, atol=0.03, rtol=0)


def test_merge_into_8_bit_raises() -> None:
    layer, _ = eight_bits()
    model, _ = model_and_batch("lora", "llama")
    model.model.layers[1].mlp.down_proj = layer
    (graft,) = adapted(model, "a", name="lora", r=2, target_modules=["down_proj"])
    for keep_base in (True, False):
        with pytest.raises(UnsupportedError, match="8-bit base"):
            graft.merge(keep_base=keep_base)


def test_dora_norm_is_computed_on_base_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's device without storage in place of a GPU."""
    monkeypatch.setattr(dora, "module_device", lambda module: torch.device("meta"))
    base = nn.Linear(8, 4, device="meta")
    delta = LoRA(r=2, use_dora=True).build(TargetModule("a", Role.QUERY, 8, 4, has_bias=False), base)
    assert {parameter.device.type for parameter in delta.parameters()} == {"meta"}


# -- modes


@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby"])
@pytest.mark.parametrize("rows", [["a", "b", "a"], ["a", None, "b"]])
@pytest.mark.parametrize("training", [True, False])
def test_rows_after_inference_mode_train(method: str, rows: list[str | None], training: bool) -> None:
    model, batch = model_and_batch("lora", "bert")
    grafts = adapted(model, "a", "b", **METHODS[method])
    gw.activate(model, rows=rows)
    with torch.inference_mode():
        served = model(**batch).logits.clone()
    model.train(training)
    logits = model(**batch).logits
    torch.testing.assert_close(logits.detach(), served)
    logits.sum().backward()
    assert all(parameter.grad is not None for graft in grafts for parameter in graft.parameters())


def test_delete_inside_disabled_deactivates() -> None:
    model, batch = model_and_batch("lora", "llama")
    bare = answers(model, batch)
    a, b = adapted(model, "a", "b")
    gw.activate(model, ["a", "b"])
    with gw.disabled(model):
        a.delete()
    assert b.active
    gw.activate(model, rows=["b", "b", None])
    with gw.disabled(model):
        b.delete()
    assert torch.equal(answers(model, batch), bare)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_attach_to_peft_model_raises_until_merged(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES["llama"].build()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"already has adapter layers of another library \(peft\.") as caught:
        gw.attach(model, LoRA(r=2))
    assert caught.value.exit_code == 4
    assert "merge_and_unload" in (caught.value.hint or "")
    assert list(model.state_dict()) == keys
    base = wrapped.merge_and_unload()
    assert len(gw.attach(base, LoRA(r=2)).targets) == 14
