"""LoRA on parameters in PEFT's folders, both ways, with the wrappers of one module nested as PEFT nests them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, ConfigError, UnsupportedError
from graftwerk.inspection.adapter import describe_adapter
from graftwerk.methods.lora import LoRA
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.families import FAMILIES
from tests.serialization.peft_models import load_in_peft, save_peft_adapter

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
UP, DOWN, GATE = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
BUILT = ("mixtral", "qwen2_moe")

# PEFT looks for the keys of patterns among modules alone, and says so of those that it finds at parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


def moe(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)).eval()
    if kind == "qwen2_moe":
        sizes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
        return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIZES, **sizes)).eval()
    if kind == "gpt_oss":
        model = tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=4, head_dim=4)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model
    return FAMILIES[kind].build()


def run(model: Any) -> Tensor:
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def move(parameters: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


def made_by_peft(kind: str, folder: Path, **settings: Any) -> Tensor:
    settings = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": [], **settings}
    return run(save_peft_adapter(moe(kind), peft.LoraConfig(**settings), folder, scale=0.2))


def read_by_peft(kind: str, folder: Path) -> Tensor:
    return run(load_in_peft(moe(kind), folder))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]


PARAMETERS = [[UP], [DOWN], [UP, DOWN], [DOWN, GATE]]
MODULES = pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"]], ids=["alone", "beside modules"])


@MODULES
@pytest.mark.parametrize("parameters", PARAMETERS, ids=["up", "down", "both", "down and router"])
@pytest.mark.parametrize("kind", BUILT)
def test_save_adapter_target_parameters_gives_equal_outputs_in_peft(
    kind: str, parameters: list[str], modules: list[str], tmp_path: Path
) -> None:
    model = moe(kind)
    base = run(model)
    method = LoRA(
        r=3, lora_alpha=5, target_modules=modules, target_parameters=parameters,
        rank_pattern={parameters[0]: 2}, alpha_pattern={parameters[-1]: 7},
    )  # fmt: skip
    adapter = gw.attach(model, method)
    move(adapter.parameters())
    expected = run(model)
    assert (expected - base).abs().max() > 1e-2
    save_adapter(adapter, tmp_path)
    torch.testing.assert_close(read_by_peft(kind, tmp_path), expected, **CLOSE)
    again = moe(kind)
    loaded = load_adapter(again, tmp_path)
    torch.testing.assert_close(run(again), expected, **CLOSE)
    assert loaded.method == method
    assert loaded.state_dict().keys() == adapter.state_dict().keys()


@MODULES
@pytest.mark.parametrize("parameters", PARAMETERS, ids=["up", "down", "both", "down and router"])
@pytest.mark.parametrize("kind", BUILT)
def test_load_adapter_peft_target_parameters_gives_equal_outputs(
    kind: str, parameters: list[str], modules: list[str], tmp_path: Path
) -> None:
    expected = made_by_peft(
        kind, tmp_path / "theirs", target_parameters=parameters, target_modules=modules, use_rslora=True,
        rank_pattern={parameters[0]: 2}, alpha_pattern={parameters[-1]: 7},
    )  # fmt: skip
    model = moe(kind)
    adapter = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(run(model), expected, **CLOSE)
    save_adapter(adapter, tmp_path / "ours")
    torch.testing.assert_close(read_by_peft(kind, tmp_path / "ours"), expected, **CLOSE)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"]),
        ("gpt_oss", ["gate_up_proj_bias"]),
        ("llama", ["q_proj.weight", "down_proj.weight"]),
        ("llama", ["embed_tokens.weight"]),
        ("gpt2", ["c_attn.weight"]),
    ],
)
def test_target_parameters_of_other_layouts_roundtrip_with_peft(
    kind: str, parameters: list[str], tmp_path: Path
) -> None:
    expected = made_by_peft(kind, tmp_path / "theirs", target_parameters=parameters)
    model = moe(kind)
    base = run(model)
    adapter = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(run(model), expected, **CLOSE)
    assert (expected - base).abs().max() > 1e-3
    save_adapter(adapter, tmp_path / "ours")
    torch.testing.assert_close(read_by_peft(kind, tmp_path / "ours"), expected, **CLOSE)


def test_save_adapter_nests_keys_of_one_module_as_peft(tmp_path: Path) -> None:
    model = moe("mixtral")
    save_adapter(gw.attach(model, LoRA(r=3, target_modules=[], target_parameters=[UP, DOWN])), tmp_path)
    experts = "base_model.model.model.layers.1.mlp.experts"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{experts}.lora_A.weight"].shape == (12, 24)  # of down_proj, which comes last in the module
    assert tensors[f"{experts}.base_layer.lora_A.weight"].shape == (12, 16)
    assert len(tensors) == 8
    config = config_of(tmp_path)
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == []


def test_save_adapter_layers_are_written_into_target_parameters(tmp_path: Path) -> None:
    model = moe("mixtral")
    method = LoRA(r=3, target_modules=["q_proj"], target_parameters=[UP], layers="top-1")
    adapter = gw.attach(model, method)
    move(adapter.parameters())
    save_adapter(adapter, tmp_path)
    assert config_of(tmp_path)["target_parameters"] == ["1.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(read_by_peft("mixtral", tmp_path), run(model), **CLOSE)


def test_save_adapter_target_parameters_keep_module_name(tmp_path: Path) -> None:
    """PEFT compares the names of its own parameters too, all of which end in `weight`."""
    model = moe("llama")
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    adapter = gw.attach(model, LoRA(r=2, target_modules=[], target_parameters=names))
    move(adapter.parameters())
    save_adapter(adapter, tmp_path)
    assert all("." in name for name in config_of(tmp_path)["target_parameters"])
    torch.testing.assert_close(read_by_peft("llama", tmp_path), run(model), **CLOSE)


def test_save_adapter_gpt2_parameters_and_layers_use_graftwerk_type(tmp_path: Path) -> None:
    model = moe("gpt2")
    method = LoRA(r=2, target_modules=["c_attn"], target_parameters=["c_fc.weight"])
    adapter = gw.attach(model, method)
    move(adapter.parameters())
    save_adapter(adapter, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "GRAFTWERK_LORA"
    again = moe("gpt2")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(run(again), run(model), **CLOSE)


def test_load_adapter_trainable_peft_parameters_get_gradients(tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path, target_parameters=[UP, DOWN])
    model = moe("mixtral")
    adapter = load_adapter(model, tmp_path, trainable=True)
    ids = torch.arange(4, 64).view(4, 15)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


def test_load_adapter_unknown_target_parameter_raises(tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path, target_parameters=[UP])
    with pytest.raises(AdapterError, match=f"target_parameters names `{UP}`"):
        load_adapter(moe("llama"), tmp_path)


def test_load_adapter_missing_unexpected_or_misshapen_tensors_raise(tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path, target_parameters=[UP, DOWN])
    file, experts = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.experts"
    tensors = load_file(file)
    key = f"{experts}.base_layer.lora_A.weight"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != key}, "missing .*base_layer.lora_A.weight"),
        ({**tensors, f"{experts}.base_layer.base_layer.lora_A.weight": tensors[key].clone()}, "not known here"),
        ({**tensors, key: tensors[key][:-1].clone()}, "mis-shaped"),
        ({**tensors, key: tensors[key][:-4].clone()}, "mis-shaped"),
        ({**tensors, key: torch.zeros(12, 17)}, "mis-shaped"),
    ):
        save_file(dict(changed), file)
        with pytest.raises(AdapterError, match=words):
            load_adapter(moe("mixtral"), tmp_path)
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config_of(tmp_path), "r": 4}))
    with pytest.raises(AdapterError, match="has rank 3, but the settings say r=4"):
        load_adapter(moe("mixtral"), tmp_path)


@pytest.mark.parametrize("edit", [{"lora_dropout": 0.1}, {"target_parameters": "experts.down_proj"}])
def test_load_adapter_setting_invalid_for_parameters_raises(edit: dict[str, Any], tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path, target_parameters=[UP])
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config_of(tmp_path), **edit}))
    with pytest.raises(ConfigError, match=next(iter(edit))):
        load_adapter(moe("mixtral"), tmp_path)


def test_load_adapter_one_dimensional_parameter_raises(tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path, target_parameters=[UP])
    edit = {"target_parameters": [UP, "model.norm.weight"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config_of(tmp_path), **edit}))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight.*1 dimension"):
        load_adapter(moe("mixtral"), tmp_path)


def test_describe_adapter_experts_norm_equals_merged_difference(tmp_path: Path) -> None:
    model = moe("mixtral")
    adapter = gw.attach(model, LoRA(r=3, target_modules=["q_proj"], target_parameters=[DOWN]))
    move(adapter.parameters())
    save_adapter(adapter, tmp_path)
    found = {one["module"]: one for one in describe_adapter(tmp_path)["learnt"]}
    path = "model.layers.1.mlp.experts.down_proj"
    value = dict(model.named_parameters())[path]
    before = value.detach().clone()
    adapter.merge()
    assert found[path]["norm"] == pytest.approx(float((value.detach() - before).norm()), rel=1e-4)
    assert (found[path]["rank"], found[path]["what"]) == (3, "updates of 4 experts")
    assert found["model.layers.1.self_attn.q_proj"]["what"] == "update"
    assert len(found) == 4


def test_describe_adapter_mixed_ranks_in_a_module_describes_factors(tmp_path: Path) -> None:
    kinds = []
    for pattern in ({}, {"rank_pattern": {"down_proj": 2}}, {"alpha_pattern": {"down_proj": 2}}):
        method = LoRA(**{"r": 3, "target_modules": [], "target_parameters": [UP, DOWN], **pattern})
        save_adapter(gw.attach(moe("mixtral"), method), tmp_path / str(len(kinds)))
        learnt = describe_adapter(tmp_path / str(len(kinds)))["learnt"]
        kinds.append({one["what"] for one in learnt})
    assert kinds == [{"updates of 4 experts"}, {"A and B as stored"}, {"A and B as stored"}]
