"""Every method on bfloat16 bases and under autocast, beside the same values in float32; and a 7B base on `meta`."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.methods.lora import LoRA
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, PAIRS, method_of, model_and_batch, perturb

BF16 = torch.bfloat16
FAMILIES = ("llama", "bert", "t5")
LOGITS, GRADIENTS, MERGED = 0.02, 0.15, 0.02
"""Bounds on the norm of a difference from float32, over the norm in float32; measured: 0.011, 0.087 (T5), 0.010."""
CASES = [
    pytest.param(*pair, marks=() if FAMILIES[list(METHODS).index(pair[0]) % 3] == pair[1] else pytest.mark.slow)
    for pair in PAIRS
    if pair[1] in FAMILIES
]


def adapted(method: str, family: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], gw.Adapter]:
    """Return a model whose values are bfloat16's, in a type, with an adapter of the same values whatever the type."""
    model, batch = model_and_batch(method, family)
    model = model.to(BF16).to(dtype)
    torch.manual_seed(5)
    adapter = gw.attach(model, method_of(method), name="a")
    if method != "full":
        perturb(adapter.parameters(), 8, scale=0.05)
    return model, batch, adapter


def pass_of(model: Any, batch: dict[str, Tensor], adapter: gw.Adapter) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(**batch).logits
    weights = torch.linspace(-1, 1, logits.numel(), device="cpu").view_as(logits).sin()
    model.zero_grad()
    (logits.float() * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return logits.detach(), gradients  # type: ignore[return-value]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def far(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the distance of all gradients as one vector."""
    return distance(*(torch.cat([side[key].flatten().double() for key in exact]) for side in (found, exact)))


@pytest.mark.filterwarnings("ignore:full fine-tuning trains")
@pytest.mark.parametrize(("method", "family"), CASES)
def test_method_in_bfloat16_and_under_autocast_is_near_float32(method: str, family: str, tmp_path: Path) -> None:
    exact, batch, reference = adapted(method, family, torch.float32)
    logits, gradients = pass_of(exact, batch, reference)
    for dtype, autocast in ((BF16, False), (BF16, True), (torch.float32, True)):
        model, _, adapter = adapted(method, family, dtype)
        if method != "full":
            assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        context: AbstractContextManager[Any] = torch.autocast("cpu", BF16) if autocast else nullcontext()
        with context:
            found, found_gradients = pass_of(model, batch, adapter)
        assert distance(found, logits) < LOGITS
        assert far(found_gradients, gradients) < GRADIENTS
        if dtype == BF16 and not autocast:
            _check_saved(method, family, model, adapter, batch, tmp_path)
        if adapter.method.mergeable and autocast is False:
            _check_merged(model, adapter, batch, exact, reference)


def _check_saved(
    method: str, family: str, model: Any, adapter: gw.Adapter, batch: dict[str, Tensor], folder: Path
) -> None:
    """Save, load onto another bfloat16 base, and compare to the bit."""
    with torch.no_grad():
        expected = model(**batch).logits
    adapter.save(folder)
    other = model_and_batch(method, family)[0].to(BF16)
    loaded = load_adapter(other, folder, name="a")
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, expected)
    stored = loaded.state_dict()
    assert all(torch.equal(stored[key], value) for key, value in adapter.state_dict().items())


def _check_merged(model: Any, adapter: gw.Adapter, batch: dict[str, Tensor], exact: Any, reference: gw.Adapter) -> None:
    """Merge in bfloat16 and in float32: the former's weights are the latter's, rounded once."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter.merge()
    reference.merge()
    with torch.no_grad():
        assert distance(model(**batch).logits, exact(**batch).logits) < MERGED
    wide = dict(exact.named_parameters())
    changed = 0
    for name, parameter in model.named_parameters():
        if parameter.dtype == BF16:
            changed += not torch.equal(parameter, before[name])
            assert torch.equal(parameter, wide[name].to(BF16)), name
    assert changed or not adapter.hosts  # a probe has its head alone
    adapter.unmerge()
    reference.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("dtype", "lost"), [("bfloat16", "0.39%"), ("float16", "0.05%")])
def test_attach_full_to_base_of_16_bits_warns_with_count_unless_it_only_answers(
    dtype: str, lost: str, tmp_path: Path
) -> None:
    model = model_and_batch("full", "bert")[0].to(getattr(torch, dtype))
    model.bert.pooler.float()
    number = len(list(model.parameters()))
    words = rf"full fine-tuning trains {number - 2} of {number} tensors .* in {dtype}: .* below {lost} of"
    with pytest.warns(UserWarning, match=words) as caught:
        adapter = gw.attach(model, method_of("full"))
    assert caught[0].filename == __file__
    adapter.save(tmp_path / "full")
    gw.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path / "full")
        gw.detach(model)
        gw.attach(model.float(), method_of("full"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_attach_to_base_of_16_bits_trains_float32_whatever_the_default_type(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family = "t5" if method == "prefix mlp" else "bert"
    model = model_and_batch(method, family)[0].to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        adapter = gw.attach(model, method_of(method))
        types = {parameter.dtype for parameter in adapter.parameters()}
        adapter.save(tmp_path / "adapter")
        gw.detach(model)
        loaded = load_adapter(model, tmp_path / "adapter", trainable=True)
        types |= {parameter.dtype for parameter in loaded.parameters()}
    finally:
        torch.set_default_dtype(before)
    assert types == {torch.float32}


def test_7b_shaped_base_in_bfloat16_takes_two_bytes_a_parameter() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(dtype="bfloat16")).to(BF16)
        adapter = gw.attach(model, LoRA(r=16))
    own = {id(parameter) for parameter in adapter.parameters()}
    base = [parameter for parameter in model.parameters() if id(parameter) not in own]
    assert sum(parameter.numel() for parameter in base) == adapter.num_base_parameters == 6_738_415_616
    assert sum(parameter.nbytes for parameter in base) == 2 * 6_738_415_616
    assert not any(parameter.requires_grad for parameter in base)
    trained = sum(parameter.nbytes for parameter in adapter.parameters())
    assert trained == 4 * adapter.num_parameters > 0
    assert trained + sum(parameter.nbytes for parameter in base) < 1.02 * 2 * 6_738_415_616
