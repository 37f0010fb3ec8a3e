"""Norms read from files are those of what acts on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwerk.errors import AdapterError, IntegrityError
from graftwerk.inspection.adapter import Learnt, by_layer, describe_adapter
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import attach
from graftwerk.serialization.folder import save_adapter
from tests.families import FAMILIES


def stored(folder: Path, method: Any, family: str = "bert") -> tuple[Any, dict[str, Any]]:
    """A graft whose every parameter was moved from its start, and what its folder says."""
    model = FAMILIES[family].build(classifier=True)
    graft = attach(model, parse_method(method), "news")
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(graft, folder, metadata={"labels": ["a", "b", "c"], "metrics": {"test": {"accuracy": {"value": 0.5}}}})
    return graft, describe_adapter(folder)


def entries(described: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    return {one["module"]: one for one in described["learnt"] if one["what"] == what}


@pytest.mark.parametrize("method", [{"name": "lora", "r": 3, "lora_alpha": 12}, {"name": "rslora", "r": 4}, "dora"])
def test_describe_adapter_lora_norm_equals_product(tmp_path: Path, method: Any) -> None:
    graft, described = stored(tmp_path, method)
    tensors = graft.state_dict()
    updates = entries(described, "update")
    assert len(updates) == len(graft.targets) > 5
    for path, one in updates.items():
        a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        product = graft.method.scale_at(path) * (b @ a)
        assert one["norm"] == pytest.approx(float(product.norm()), rel=1e-4)
        largest = torch.linalg.matrix_norm(product, 2)
        assert one["stable_rank"] == pytest.approx(float((product.norm() / largest) ** 2), rel=1e-3)
        assert one["rank"] == graft.method.r
    assert (len(entries(described, "magnitudes")) > 0) == (method == "dora")


def test_describe_adapter_pissa_norm_is_relative_to_start(tmp_path: Path) -> None:
    graft, described = stored(tmp_path, "pissa")
    tensors = graft.state_dict()
    for path, one in entries(described, "update").items():
        moved = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        moved = moved - tensors[f"{path}.start_B"] @ tensors[f"{path}.start_A"]
        assert one["norm"] == pytest.approx(float(graft.method.scale_at(path) * moved.norm()), rel=1e-3)


def test_describe_adapter_other_methods_measure_effective_change(tmp_path: Path) -> None:
    graft, described = stored(tmp_path / "ia3", "ia3")
    for path, one in entries(described, "scales, less one").items():
        assert one["norm"] == pytest.approx(float((graft.state_dict()[f"{path}.ia3_l"] - 1).norm()), rel=1e-4)
    graft, described = stored(tmp_path / "hira", "hira")
    for path, one in entries(described, "factor on the weight, less one").items():
        product = graft.state_dict()[f"{path}.hira_B"] @ graft.state_dict()[f"{path}.hira_A"]
        assert one["norm"] == pytest.approx(float(product.norm()), rel=1e-4)
        assert one["rank"] == 8
    graft, described = stored(tmp_path / "oft", "oft")
    for path, one in entries(described, "angles of rotation").items():
        assert one["norm"] == pytest.approx(float(graft.state_dict()[f"{path}.oft_R.weight"].norm()), rel=1e-4)
    graft, described = stored(tmp_path / "bottleneck", "bottleneck")
    for path, one in entries(described, "up · down").items():
        tensors = graft.state_dict()
        product = tensors[f"{path}.bottleneck.up.weight"] @ tensors[f"{path}.bottleneck.down.weight"]
        assert one["norm"] == pytest.approx(float(product.norm()), rel=1e-4)
        assert one["parameters"] == sum(
            tensor.numel() for key, tensor in tensors.items() if key.startswith(f"{path}.bottleneck.")
        )


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    "method",
    ["lora", "dora", "miss", "hira", {"name": "shira", "r": 2}, "oft", "bottleneck", "prefix", "prompt", "ptuning",
     "ia3", "bitfit", "probe", "full"],
    ids=str,
)  # fmt: skip
def test_describe_adapter_counts_every_parameter_once(tmp_path: Path, method: Any, family: str) -> None:
    if (method, family) == ("bitfit", "llama"):
        pytest.skip("Llama has no biases")
    graft, described = stored(tmp_path, method, family)
    assert sum(one["parameters"] for one in described["learnt"]) == described["parameters"]
    assert sum(layer["parameters"] for layer in described["layers"]) == described["parameters"]
    total = sum(one["norm"] ** 2 for one in described["learnt"])
    assert sum(layer["norm"] ** 2 for layer in described["layers"]) == pytest.approx(total)
    assert all(one["norm"] > 0 for one in described["learnt"])
    assert described["name"] == "news"
    assert described["labels"] == ["a", "b", "c"]
    assert described["metadata"]["metrics"]["test"]["accuracy"]["value"] == 0.5
    if method not in ("prompt", "ptuning", "probe"):
        assert len([layer for layer in described["layers"] if layer["layer"].rpartition(".")[2].isdecimal()]) == 2
    assert described["parameters"] >= graft.num_head_parameters


def test_describe_adapter_layers_are_in_numeric_order(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8)
    save_adapter(attach(BertForSequenceClassification(config), parse_method("bitfit")), tmp_path)
    numbers = [layer["layer"].rpartition(".")[2] for layer in describe_adapter(tmp_path)["layers"]]
    assert [int(number) for number in numbers if number.isdecimal()] == list(range(12))


def test_describe_adapter_without_graftwerk_json_gives_same_layers(tmp_path: Path) -> None:
    _, ours = stored(tmp_path, "lora")
    (tmp_path / "graftwerk.json").unlink()
    theirs = describe_adapter(tmp_path)
    assert theirs["base"]["fingerprint"] is None
    assert theirs["method"]["r"] == 8
    assert theirs["layers"] == ours["layers"]


def test_describe_adapter_peft_folder_keeps_relevant_settings(tmp_path: Path) -> None:
    """Of PEFT's many keys those stay that decide what is computed."""
    from peft import LoraConfig, get_peft_model

    model = FAMILIES["bert"].build(classifier=True)
    settings = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path)
    described = describe_adapter(tmp_path)
    kept = described["method"]
    assert set(kept) == {"r", "lora_alpha", "target_modules", "modules_to_save"}
    assert (kept["r"], kept["lora_alpha"], kept["target_modules"]) == (4, 8, ["query"])
    layers = {layer["layer"]: layer for layer in described["layers"]}
    assert [layer["parameters"] for layer in layers.values()] == [2 * 4 * 16, 2 * 4 * 16, 51]
    assert all(layer["norm"] > 0 for layer in layers.values())


def test_describe_adapter_peft_prefix_is_split_by_layer(tmp_path: Path) -> None:
    """PEFT keeps all layers in one tensor."""
    from peft import PrefixTuningConfig, get_peft_model

    model = FAMILIES["llama"].build()
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    vectors = peft.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        vectors.copy_(torch.arange(1.0, vectors.numel() + 1).view_as(vectors))
    peft.save_pretrained(tmp_path)
    described = describe_adapter(tmp_path)
    expected = [half.norm().item() for half in vectors.detach().chunk(2, dim=1)]
    assert [one["norm"] for one in described["learnt"]] == pytest.approx(expected)
    assert [layer["layer"] for layer in described["layers"]] == ["layer.0", "layer.1"]
    assert [one["parameters"] for one in described["learnt"]] == [vectors.numel() // 2] * 2


def test_describe_adapter_prefix_of_odd_width_is_one_tensor(tmp_path: Path) -> None:
    """Keys and values of every layer cannot be told apart in it: no layer is named."""
    from peft import PrefixTuningConfig, get_peft_model
    from safetensors.torch import save_file

    peft = get_peft_model(FAMILIES["llama"].build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    peft.save_pretrained(tmp_path)
    save_file({"prompt_embeddings": torch.ones(3, 2 * 9)}, tmp_path / "adapter_model.safetensors")
    learnt = describe_adapter(tmp_path)["learnt"]
    assert [one["parameters"] for one in learnt] == [3 * 2 * 9]
    assert not any(one["module"].startswith("layer.") for one in learnt)


def test_describe_adapter_alpha_pattern_scales_norm(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = FAMILIES["bert"].build(classifier=True)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], alpha_pattern={"value": 32}, init_lora_weights=False
    )
    get_peft_model(model, settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, one in entries(describe_adapter(tmp_path), "update").items():
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert one["norm"] == pytest.approx(float((32 if "value" in path else 8) / 4 * (b @ a).norm()), rel=1e-4)


def test_describe_adapter_changed_file_or_empty_folder_raises(tmp_path: Path) -> None:
    stored(tmp_path / "good", "lora")
    weights = tmp_path / "good" / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        describe_adapter(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no adapter"):
        describe_adapter(tmp_path / "empty")


def test_by_layer_counts_each_module_once_and_adds_norms_by_their_squares() -> None:
    query, value = "encoder.layer.0.query", "encoder.layer.0.value"
    learnt = [
        Learnt(query, "encoder.layer.0", "update", 6, 2.0),
        Learnt(query, "encoder.layer.0", "magnitudes", 3, 3.0),
        Learnt(value, "encoder.layer.0", "update", 6, 6.0),
        Learnt("classifier", None, "weights", 8, 1.5),
        Learnt("", None, "virtual tokens", 4, 0.5),
    ]
    assert by_layer(learnt) == [
        {"layer": "encoder.layer.0", "modules": 2, "parameters": 15, "norm": 7.0},
        {"layer": "classifier", "modules": 1, "parameters": 8, "norm": 1.5},
        {"layer": "input embeddings", "modules": 1, "parameters": 4, "norm": 0.5},
    ]
