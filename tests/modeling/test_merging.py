"""Folding into the base's weights and out again: equal, over the touched layers only, all or nothing, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertPreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, ConflictError, ResourceError, UnsupportedError
from graftwerk.kernels import dispatch
from graftwerk.methods.lora import LoRA, LoRAModule
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.fingerprint import fingerprint
from tests.contract.cases import METHODS, REFUSED, method_of, model_and_batch, perturb

MERGEABLE = [name for name in METHODS if method_of(name).mergeable and name != "probe"]
PAIRS = [(m, f) for m in MERGEABLE for f in ("bert", "gpt2", "llama", "t5", "opt") if (m, f) not in REFUSED]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def grafted(settings: dict[str, Any], family: str) -> tuple[Any, dict[str, Tensor], gw.Adapter]:
    model, batch = model_and_batch("lora", family)
    torch.manual_seed(5)
    graft = gw.attach(model, parse_method(settings), name="a")
    perturb(graft.parameters(), 7, scale=0.1)
    return model, batch, graft


def bits(model: Any) -> dict[str, tuple[Tensor, int]]:
    return {key: (value.clone(), value.data_ptr()) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_merge_equals_unmerged_and_unmerge_is_bit_exact(method: str, family: str) -> None:
    model, batch, graft = grafted(METHODS[method], family)
    before, plain = bits(model), logits(model, batch)
    for _ in range(3):
        graft.merge()
        torch.testing.assert_close(logits(model, batch), plain, atol=2e-5, rtol=1e-4)
        graft.unmerge()
        after = bits(model)
        assert all(torch.equal(after[key][0], value) for key, (value, _) in before.items())
        assert torch.equal(logits(model, batch), plain)
    # The very tensors from before: nothing was copied back.
    assert all(after[key][1] == place for key, (_, place) in before.items())


def test_merge_changes_touched_layers_only() -> None:
    model, _, graft = grafted({"name": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]}, "llama")
    before = bits(model)
    graft.merge()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key][0])}
    assert changed == {f"{path}.weight" for path in graft.hosts}
    moved = {key for key, value in model.state_dict().items() if value.data_ptr() != before[key][1]}
    assert moved == changed


def test_merge_saves_one_copy_of_touched_weights() -> None:
    model, _, graft = grafted(METHODS["lora attention"], "llama")
    graft.merge()
    assert graft._saved is not None
    kept = sum(tensor.nbytes for _, tensor in graft._saved)
    assert kept == sum(model.get_parameter(f"{path}.weight").nbytes for path in graft.hosts)
    graft.unmerge()
    assert graft._saved is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merge_half_precision_rounds_once(dtype: torch.dtype) -> None:
    model, _, graft = grafted(METHODS["lora"], "llama")
    for parameter in model.parameters():
        if not any(parameter is own for own in graft.parameters()):
            parameter.data = parameter.data.to(dtype)
    layer = model.model.layers[0].self_attn.q_proj
    delta = layer.graft.get("a")
    weight = layer.weight.detach().clone()
    exact = weight.double() + delta.scale * delta.lora_B.weight.double() @ delta.lora_A.weight.double()
    graft.merge()
    assert layer.weight.dtype == dtype
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # the adapter is float32
    torch.testing.assert_close(layer.weight.double(), exact, atol=step * 0.01, rtol=step * 1.01)
    graft.unmerge()
    assert torch.equal(layer.weight, weight)


def test_merge_failure_leaves_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, graft = grafted(METHODS["lora"], "llama")
    before, plain = bits(model), logits(model, batch)
    calls = []
    folded = LoRAModule.merged_weight

    def third_fails(self: LoRAModule, weight: Tensor, bias: Tensor | None) -> Any:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("no more room")
        return folded(self, weight, bias)

    monkeypatch.setattr(LoRAModule, "merged_weight", third_fails)
    with pytest.raises(MemoryError):
        graft.merge()
    assert not graft.merged
    assert all(torch.equal(value, before[key][0]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batch), plain)
    monkeypatch.setattr(LoRAModule, "merged_weight", folded)
    graft.merge()
    assert graft.merged


def test_merge_quantized_layer_raises_before_any_change() -> None:
    model, _, graft = grafted(METHODS["lora"], "llama")
    before = bits(model)
    last = model.get_submodule(graft.hosts[-1])
    last.weight.quant_state = object()
    with pytest.raises(UnsupportedError, match="4-bit"):
        graft.merge()
    assert all(torch.equal(value, before[key][0]) for key, value in model.state_dict().items())


def test_fingerprint_while_merged_is_of_base() -> None:
    model, _, graft = grafted(METHODS["lora"], "llama")
    before = fingerprint(model)
    graft.merge()
    assert fingerprint(model) == before
    assert graft.merged


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_merge_in_place_equals_merge_and_cannot_be_undone(method: str, family: str) -> None:
    model, batch, graft = grafted(METHODS[method], family)
    before, plain = bits(model), logits(model, batch)
    graft.merge(keep_base=False)
    assert graft.merged
    merged = logits(model, batch)
    torch.testing.assert_close(merged, plain, atol=2e-5, rtol=1e-4)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == {
        key: place for key, (_, place) in before.items()
    }
    assert any(not torch.equal(value, before[key][0]) for key, value in model.state_dict().items())
    graft.merge()  # it is merged already
    for undo in (graft.unmerge, graft.delete, lambda: gw.detach(model), lambda: fingerprint(model)):
        with pytest.raises(UnsupportedError, match="weights are gone"):
            undo()
    with pytest.raises(UnsupportedError, match="weights are gone"), gw.disabled(model):
        pass
    assert torch.equal(logits(model, batch), merged)


def test_merge_in_place_half_precision_rounds_once() -> None:
    """As merging with a way back rounds."""
    found = []
    for keep_base in (True, False):
        model, _, graft = grafted(METHODS["lora"], "llama")
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        graft.merge(keep_base=keep_base)
        found.append({path: model.get_submodule(path).weight.clone() for path in graft.hosts})
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


def test_merge_in_place_quantized_layer_raises_before_any_change() -> None:
    model, _, graft = grafted(METHODS["lora"], "llama")
    before = bits(model)
    model.get_submodule(graft.hosts[-1]).weight.quant_state = object()
    with pytest.raises(UnsupportedError, match="4-bit"):
        graft.merge(keep_base=False)
    assert not graft.merged
    assert all(torch.equal(value, before[key][0]) for key, value in model.state_dict().items())


def test_merge_in_place_out_of_memory_reports_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, graft = grafted(METHODS["lora"], "llama")
    merge_lora_ = dispatch.merge_lora_

    def scarce(lora: LoRAModule, weight: Tensor) -> bool:
        if lora is last:
            raise MemoryError("no memory")
        return merge_lora_(lora, weight)

    *_, (_, last) = graft.modules()
    monkeypatch.setattr(dispatch, "merge_lora_", scarce)
    with pytest.raises(ResourceError, match="neither what it was nor merged") as caught:
        graft.merge(keep_base=False)
    assert f"after {len(graft.hosts) - 1} of {len(graft.hosts)} layers" in str(caught.value)


def test_disabled_while_merged_restores_base_and_merged_weights() -> None:
    model, batch, graft = grafted(METHODS["lora"], "llama")
    with gw.disabled(model):
        bare = logits(model, batch)
    other = gw.attach(model, parse_method(METHODS["ia3"]), name="b")
    perturb(other.parameters(), 9, scale=0.1)
    gw.activate(model, "a")
    graft.merge()
    gw.activate(model, ["a", "b"])  # the other one works on the merged weights
    merged, both = bits(model), logits(model, batch)
    with gw.disabled(model):
        assert torch.equal(logits(model, batch), bare)
        with gw.disabled(model):
            assert torch.equal(logits(model, batch), bare)
    assert graft.merged
    assert {key: place for key, (_, place) in bits(model).items()} == {key: place for key, (_, place) in merged.items()}
    assert torch.equal(logits(model, batch), both)


def test_delete_merged_inside_disabled_unmerges() -> None:
    model, batch, graft = grafted(METHODS["lora"], "llama")
    with gw.disabled(model):
        bare = logits(model, batch)
    graft.merge()
    with gw.disabled(model):
        graft.delete()
    assert not gw.adapters(model)
    assert torch.equal(logits(model, batch), bare)


class _Unlisted(BertPreTrainedModel):  # type: ignore[misc]
    """A model of an unknown architecture; one of its layers may be read in a way of its own."""

    def __init__(self, config: Any, reads: bool) -> None:
        super().__init__(config)
        self.config.model_type = "unlisted"
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.called = nn.Linear(config.hidden_size, config.hidden_size)
        self.read = nn.Linear(config.hidden_size, config.hidden_size)
        self.reads = reads
        self.post_init()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.called(self.embed(input_ids)).tanh()
        x = x @ self.read.weight.T if self.reads else self.read(x)
        return BaseModelOutput(last_hidden_state=x)


def unlisted(reads: bool) -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    return _Unlisted(config, reads).train()


@pytest.mark.parametrize("scale", [1e-2, 0.3])
@pytest.mark.parametrize("targets", [("read",), ("called", "read")], ids=["alone", "among others"])
@pytest.mark.parametrize("keep_base", [True, False])
def test_merge_that_changes_outputs_raises(keep_base: bool, targets: tuple[str, ...], scale: float) -> None:
    model = unlisted(reads=True)
    graft = gw.attach(model, LoRA(r=2, target_modules=targets))
    perturb(graft.parameters(), 1, scale)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with pytest.raises(UnsupportedError, match=r"merging `default` changes the answers by up to [\d.e-]+, where"):
        graft.merge(keep_base=keep_base)
    assert [module.training for module in model.modules()] == flags
    if keep_base:
        assert not graft.merged
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 3.0])
def test_merge_that_only_rounds_is_accepted(scale: float, dtype: torch.dtype) -> None:
    model = unlisted(reads=False).to(dtype)
    graft = gw.attach(model, LoRA(r=2))
    perturb(graft.parameters(), 1, scale)
    graft.merge()
    assert graft.merged


def test_merge_into_parametrized_weight_raises() -> None:
    model = unlisted(reads=False)
    nn.utils.parametrizations.weight_norm(model.called)
    graft = gw.attach(model, LoRA(r=2))
    perturb(graft.parameters(), 1)
    with pytest.raises(UnsupportedError, match="computed from others"):
        graft.merge()
    assert not graft.merged


def test_load_state_dict_with_missing_tensors_names_five_and_counts_the_rest() -> None:
    _, _, graft = grafted(METHODS["lora"], "llama")
    state = graft.state_dict()
    for key in list(state)[:7]:
        del state[key]
    with pytest.raises(AdapterError, match=r"^7 missing: (\S+, ){4}\S+ and 2 more\n"):
        graft.load_state_dict(state)


def test_merge_while_rows_have_adapters_raises() -> None:
    model, _ = model_and_batch("lora", "bert", rows=2)
    adapter = gw.attach(model, method_of("lora"), name="a")
    gw.activate(model, rows=["a", None])
    with pytest.raises(ConflictError, match="not the one active adapter"):
        adapter.merge()
    gw.activate(model, "a")
    adapter.merge()
    assert adapter.merged
