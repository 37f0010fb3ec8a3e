"""Adapters on bare parameters: the experts of a mixture, read through the adapter while it is active."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.lora import LoRA
from graftwerk.methods.lora_parameters import ParameterLoRA
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.parameter_targets import by_host
from tests.contract.cases import perturb
from tests.families import FAMILIES
from tests.modeling.unusual import S, answer, built, token_ids

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {**S, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def moe(kind: str = "mixtral", implementation: str = "grouped_mm") -> Any:
    if kind == "mixtral":
        model = built("MixtralForCausalLM", tf.MixtralConfig(**MOE, num_local_experts=4))
    elif kind == "qwen2_moe":
        sizes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
        model = built("Qwen2MoeForCausalLM", tf.Qwen2MoeConfig(**MOE, **sizes))
    else:
        sizes = {"num_local_experts": 4, "head_dim": 4}
        model = built("GptOssForCausalLM", tf.GptOssConfig(**MOE, **sizes))
    model.set_experts_implementation(implementation)
    return model.float()  # fused experts take no float64


def attached(model: Any, name: str = "a", seed: int = 1, **settings: Any) -> gw.Adapter:
    method = LoRA(**{"r": 2, "target_modules": [], "target_parameters": EXPERTS, **settings})
    adapter = gw.attach(model, method, name=name)
    perturb(adapter.parameters(), seed)
    return adapter


def logits(model: Any) -> Tensor:
    return answer(model, input_ids=token_ids())


def with_weights(model: Any, adapter: gw.Adapter) -> Tensor:
    """The answer of a copy of the bare model whose parameters are W_e + s B_e A_e, summed expert by expert."""
    tensors = adapter.state_dict()
    other = copy.deepcopy(model)
    gw.detach(other)
    with torch.no_grad():
        for target in adapter.targets:
            value = other.get_parameter(target.path)
            a, b = (tensors[f"{target.path}.lora_{side}.weight"] for side in "AB")
            rank, scale = adapter.method.rank_at(target.path), adapter.method.scale_at(target.path)
            for e in range(target.experts):
                update = scale * b[:, e :: target.experts] @ a[e * rank : (e + 1) * rank]
                (value if value.dim() == 2 else value[e]).add_(
                    update.T if "gptoss" in type(model).__name__.lower() else update
                )
    return logits(other)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_parameter_lora_outputs_equal_sum_per_expert(kind: str, implementation: str) -> None:
    model = moe(kind, implementation)
    base = logits(model)
    adapter = attached(model, rank_pattern={"down_proj": 3}, alpha_pattern={"gate_up_proj": 5})
    found = logits(model)
    assert (found - base).abs().max() > 1e-3
    torch.testing.assert_close(found, with_weights(model, adapter), atol=1e-5, rtol=1e-5)
    assert adapter.num_parameters == adapter.method.num_parameters(adapter.targets)
    assert adapter.hosts == tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))


def test_router_weight_of_two_dimensions_is_a_target() -> None:
    model = moe()
    base = logits(model)
    adapter = attached(model, target_parameters=["mlp.gate.weight"])
    assert (logits(model) - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), with_weights(model, adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_parameter_lora_sum_is_computed_once_per_forward(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(implementation=implementation)
    attached(model)
    counted = []
    own = ParameterLoRA.merged_value
    monkeypatch.setattr(ParameterLoRA, "merged_value", lambda self, value: counted.append(self) or own(self, value))
    logits(model)
    assert len(counted) == len(set(counted)) == 4  # two parameters of two layers
    with gw.disabled(model):
        logits(model)
    assert len(counted) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_element_and_equal_those_of_weights(checkpointing: bool) -> None:
    model = moe(implementation="eager").train()
    ids = torch.arange(4, 64).view(4, 15)  # every expert gets tokens
    adapter = attached(model, target_parameters=EXPERTS[1:])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()
    path = "model.layers.0.mlp.experts.down_proj"
    found = dict(adapter.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in found.values())
    assert all(
        parameter.grad is None for parameter in model.parameters() if not any(parameter is p for p in found.values())
    )
    # dL/dA_e = s B_e^T dL/dW_e, with dL/dW_e of the merged weights.
    adapter.merge()
    value = model.get_parameter(path)
    value.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    b, scale = found[f"{path}.lora_B.weight"], adapter.method.scale_at(path)
    expected = torch.cat([scale * b[:, e::4].T @ value.grad[e] for e in range(4)])
    torch.testing.assert_close(found[f"{path}.lora_A.weight"].grad, expected, atol=1e-6, rtol=1e-4)


def test_parameter_lora_switching_and_disabling_select_one_adapter() -> None:
    model = moe()
    base = logits(model)
    first = attached(model)
    one = logits(model)
    second = attached(model, "b", 2, target_parameters=EXPERTS[:1], r=3)
    two = logits(model)
    assert (one - two).abs().max() > 1e-3
    assert (two - base).abs().max() > 1e-3
    gw.activate(model, "a")
    assert torch.equal(logits(model), one)
    gw.activate(model, ["a", "b"])
    assert not torch.equal(logits(model), one)
    with gw.disabled(model):
        assert torch.equal(logits(model), base)
    gw.activate(model, None)
    assert torch.equal(logits(model), base)
    first.delete()
    gw.activate(model, "b")
    assert torch.equal(logits(model), two)
    second.delete()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "v_proj"]}], ids=["alone", "beside modules"])
def test_merge_equals_unmerged_and_detach_is_bit_exact(settings: dict[str, Any]) -> None:
    model = moe()
    before = {key: (value.clone(), value.data_ptr()) for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    base = logits(model)
    adapter = attached(model, **settings)
    found = logits(model)
    for _ in range(2):
        adapter.merge()
        assert not torch.equal(
            model.get_parameter("model.layers.0.mlp.experts.down_proj"),
            before["model.layers.0.mlp.experts.down_proj"][0],
        )
        torch.testing.assert_close(logits(model), found, atol=1e-5, rtol=1e-5)
        with gw.disabled(model):
            assert torch.equal(logits(model), base)
        adapter.unmerge()
        assert torch.equal(logits(model), found)
    gw.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) and after[key].data_ptr() == at for key, (value, at) in before.items())
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model), base)


def test_merge_in_place_equals_unmerged() -> None:
    model = moe()
    adapter = attached(model, target_modules=["q_proj"])
    found, value = logits(model), model.model.layers[0].mlp.experts._parameters["down_proj"]
    place = value.data_ptr()
    adapter.merge(keep_base=False)
    torch.testing.assert_close(logits(model), found, atol=1e-5, rtol=1e-5)
    assert value.data_ptr() == place


def test_merge_of_a_tied_parameter_raises() -> None:
    model = FAMILIES["llama"].build()
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = attached(model, target_parameters=["lm_head.weight"])
    with pytest.raises(UnsupportedError, match="is tied"):
        adapter.merge()


def test_rows_raise_and_name_the_parameter_but_other_adapters_may_differ() -> None:
    model = moe()
    base = logits(model)
    gw.attach(model, LoRA(r=2, target_modules=["q_proj"]), "plain")
    attached(model)
    with pytest.raises(
        UnsupportedError, match=r"target_parameters changes `model\.layers\.1\.mlp\.experts\.down_proj`"
    ):
        gw.activate(model, rows=["a", None])
    gw.activate(model, "a")
    gw.activate(model, rows=["plain", None])  # while "a" was the last one chosen for all rows
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-6)


def test_weight_only_layer_shows_no_adapter_that_rows_do_not_name() -> None:
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2)
    model = built("MambaForCausalLM", config)
    base = logits(model)
    perturb(gw.attach(model, LoRA(r=1, target_modules=["in_proj"]), "plain").parameters(), 3)
    model.double()
    gw.activate(model, rows=["plain", None])
    expected = logits(model)
    perturb(gw.attach(model, LoRA(r=1, target_modules=["dt_proj"]), "read").parameters(), 4)
    model.double()
    assert (logits(model) - base).abs().max() > 1e-7
    gw.activate(model, rows=["plain", None])
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("first", ["parameters", "module", "saved"])
def test_module_adapted_in_two_ways_raises_and_changes_nothing(first: str) -> None:
    model = FAMILIES["llama"].build()
    saved = parse_method({"name": "probe", "modules_to_save": ["q_proj"]})
    ways = {"parameters": LoRA(target_modules=[], target_parameters=["q_proj.weight"]),
            "module": LoRA(target_modules=["q_proj"]), "saved": saved}  # fmt: skip
    perturb(gw.attach(model, ways[first], "a").parameters(), 1)
    expected = logits(model)
    for other in {*ways} - {first} if first == "parameters" else ["parameters"]:
        with pytest.raises(UnsupportedError, match="adapted in two ways"):
            gw.attach(model, ways[other], "b")
    assert torch.equal(logits(model), expected)


def test_by_host_of_a_module_and_its_parameter_raises() -> None:
    targets = [TargetModule("x", Role.QUERY, 3, 4, False), TargetModule("x.weight", Role.PARAMETER, 3, 4, False)]
    layer = torch.nn.Linear(3, 4)
    built = {target.path: LoRA().build(target, layer) for target in targets}
    assert by_host(targets[1:], built)["x"].parameter_names == ("weight",)
    with pytest.raises(UnsupportedError, match="`x` would be adapted in two ways"):
        by_host(targets, built)


def test_names_that_match_nothing_raise_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)matches no parameter.*did you mean `experts\.gate_up_proj`"):
        gw.attach(moe(), LoRA(target_parameters=["experts.gate_upproj"]))


@pytest.mark.parametrize(
    ("parameter", "words"), [("input_layernorm.weight", "has 1 dimension, not"), ("conv1d.weight", None)]
)
def test_parameters_of_other_dimensions_raise(parameter: str, words: str | None) -> None:
    model = moe()
    if words is None:
        model.model.layers[0].conv1d = torch.nn.Conv2d(2, 2, 3)
        words = "has 4 dimensions, not two or three"
    with pytest.raises(UnsupportedError, match=words):
        gw.attach(model, LoRA(target_parameters=[parameter]))


def test_quantized_parameter_raises() -> None:
    model = moe()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(UnsupportedError, match="quantized"):
        gw.attach(model, LoRA(target_parameters=["0.mlp.experts.down_proj"]))


def test_all_linear_without_the_experts_names_target_parameters() -> None:
    model = moe()
    (text,) = gw.attach(model, LoRA(r=2)).left_out()
    assert "target_parameters reaches them by name, such as " in text
    gw.detach(model)
    (text,) = gw.attach(model, LoRA(r=2, target_parameters=EXPERTS)).left_out()
    assert text.startswith("2 of 14 weight matrices")
    assert "gate.weight" in text
    gw.detach(model)
    assert gw.attach(model, LoRA(r=2, target_parameters=[*EXPERTS, "mlp.gate.weight"])).left_out() == []


def test_saved_module_around_the_experts_is_not_adapted() -> None:
    model = moe()
    method = LoRA(target_modules=[], target_parameters=EXPERTS, modules_to_save=["layers.1.mlp"])
    assert gw.attach(model, method).hosts == ("model.layers.0.mlp.experts",)


def test_deepcopy_of_parameter_lora_gives_equal_outputs() -> None:
    model = moe()
    attached(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_generation_with_parameter_lora_equals_merged() -> None:
    model = moe()
    adapter = attached(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(token_ids(), **options)
    adapter.merge()
    assert torch.equal(model.generate(token_ids(), **options), found)


@pytest.mark.parametrize("first", [True, False], ids=["attached first", "offloaded first"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_experts_equal_in_memory(offload: Any, first: bool, tmp_path: Path) -> None:
    model = moe()
    adapter = attached(model)
    expected = logits(model)
    other = moe()
    place = [str(tmp_path)] if offload is disk_offload else []
    if first:
        own = attached(other)
        offload(other, *place, execution_device=torch.device("cpu"))
    else:
        offload(other, *place, execution_device=torch.device("cpu"))
        own = attached(other)
    torch.testing.assert_close(logits(other), expected)
    for one in (model, other):
        one(input_ids=token_ids()).logits.sum().backward()
    for parameter, wanted in zip(own.parameters(), adapter.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    with gw.disabled(other):
        assert not torch.allclose(logits(other), expected)
    with pytest.raises(UnsupportedError, match="offloaded"):
        own.merge()
