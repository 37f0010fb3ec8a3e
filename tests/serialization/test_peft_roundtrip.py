"""Folders of the PEFT library, in both directions: equal outputs.

For every kind: made by PEFT, weights randomised, saved by PEFT, loaded here; what was loaded, saved here and loaded
by PEFT. And for methods as they are made here: saved, loaded by PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    HiraConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
)
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.families import FAMILIES
from tests.serialization.peft_models import load_in_peft, save_peft_adapter

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TASKS = {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
IA3_TARGETS = {
    "bert": (["key", "value", "intermediate.dense"], ["intermediate.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}


def model_of(family: str) -> Any:
    return FAMILIES[family].build(classifier=FAMILIES[family].kind == "encoder")


def run(model: Any, family: str) -> Tensor:
    """Logits of the text; PEFT leaves those of virtual tokens in front of it."""
    batch = FAMILIES[family].batch()
    with torch.no_grad():
        logits = model(**batch).logits
    return logits if logits.dim() == 2 else logits[:, -batch.get("decoder_input_ids", batch["input_ids"]).shape[1] :]


def lora(family: str, **settings: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION[family], **settings}
    return LoraConfig(task_type=TASKS[FAMILIES[family].kind], fan_in_fan_out=family == "gpt2", **settings)


def ia3(family: str) -> IA3Config:
    targets, feedforward = IA3_TARGETS[family]
    return IA3Config(
        task_type=TASKS[FAMILIES[family].kind],
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=family == "gpt2",
    )


def linear(kind: Any, family: str, **settings: Any) -> Any:
    """A configuration of one of PEFT's other kinds for linear layers, on the layers that `lora` adapts."""
    return kind(task_type=TASKS[FAMILIES[family].kind], target_modules=ATTENTION[family], **settings)


def first_layer(family: str) -> str:
    """A path within layer 0 of what `lora` adapts."""
    return {
        "bert": "bert.encoder.layer.0.attention.self.query",
        "gpt2": "transformer.h.0.attn.c_attn",
        "llama": "model.layers.0.self_attn.q_proj",
        "t5": "encoder.block.0.layer.0.SelfAttention.q",
    }[family]


CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lora,
    "all-linear": lambda family: lora(family, target_modules="all-linear"),
    "rslora": lambda family: lora(family, use_rslora=True),
    "dora": lambda family: lora(family, use_dora=True),
    "dropout": lambda family: lora(family, lora_dropout=0.3),
    "gaussian": lambda family: lora(family, init_lora_weights="gaussian"),
    "pissa": lambda family: lora(family, init_lora_weights="pissa"),
    "patterns": lambda family: lora(
        family, rank_pattern={first_layer(family): 2}, alpha_pattern={"^" + first_layer(family): 5}
    ),
    "rslora patterns": lambda family: lora(
        family, use_rslora=True, rank_pattern={first_layer(family): 3}, alpha_pattern={first_layer(family): 7}
    ),
    "one layer": lambda family: lora(family, layers_to_transform=[1]),
    "regular expression": lambda family: lora(family, target_modules=rf".*\.({'|'.join(ATTENTION[family])})"),
    "ia3": ia3,
    "miss": lambda family: linear(MissConfig, family, r=4),
    "miss filled up": lambda family: linear(MissConfig, family, r=5, miss_dropout=0.2),
    "miss one layer": lambda family: linear(MissConfig, family, r=3, init_weights=False, layers_to_transform=[1]),
    "miss mini": lambda family: linear(MissConfig, family, r=4, init_weights="mini", mini_r=2),
    "miss bat": lambda family: linear(MissConfig, family, r=4, init_weights="bat"),
    "hira": lambda family: linear(
        HiraConfig, family, r=3, fan_in_fan_out=family == "gpt2", rank_pattern={first_layer(family): 2}
    ),
    "shira": lambda family: linear(ShiraConfig, family, r=2),
    "shira seed": lambda family: linear(ShiraConfig, family, r=2, random_seed=7),
    "oft": lambda family: linear(OFTConfig, family, oft_block_size=4),
    "oft adjusted": lambda family: linear(OFTConfig, family, oft_block_size=5, num_cayley_neumann_terms=3),
    "oft exact": lambda family: linear(OFTConfig, family, r=2, oft_block_size=0, use_cayley_neumann=False),
    "oft shared": lambda family: linear(OFTConfig, family, oft_block_size=4, block_share=True, layers_to_transform=[1]),
    "prompt": lambda family: PromptTuningConfig(task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3),
    "ptuning": lambda family: PromptEncoderConfig(
        task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3, encoder_hidden_size=6
    ),
    "ptuning lstm": lambda family: PromptEncoderConfig(
        task_type=TASKS[FAMILIES[family].kind],
        num_virtual_tokens=3,
        encoder_hidden_size=6,
        encoder_reparameterization_type="LSTM",
    ),
    "prefix": lambda family: PrefixTuningConfig(task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3),
    "prefix mlp": lambda family: PrefixTuningConfig(
        task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6
    ),
}
REFUSED = {
    *((config, family) for config in ("prefix", "prefix mlp") for family in ("bert", "t5")),
    # PEFT has these for `nn.Linear` alone, and GPT-2 has `Conv1D`.
    *((config, "gpt2") for config in CONFIGS if config.startswith(("miss", "shira", "oft"))),
}
PAIRS = [(config, family) for config in CONFIGS for family in ATTENTION if (config, family) not in REFUSED]


def made_by_peft(config: Any, family: str, folder: Path) -> Tensor:
    """Save an adapter of PEFT with random weights; return the model's outputs with it."""
    return run(save_peft_adapter(model_of(family), config, folder), family)


def loaded_by_peft(family: str, folder: Path) -> Tensor:
    return run(load_in_peft(model_of(family), folder), family)


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`", "ignore:Sparse invariant checks")
@pytest.mark.parametrize(("config", "family"), PAIRS)
def test_load_adapter_peft_roundtrip_gives_equal_outputs(config: str, family: str, tmp_path: Path) -> None:
    expected = made_by_peft(CONFIGS[config](family), family, tmp_path / "theirs")
    bare = run(model_of(family), family)
    assert not torch.allclose(expected, bare, atol=1e-3)
    model = model_of(family)
    graft = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(run(model, family), expected, **CLOSE)
    with gw.disabled(model):
        assert torch.equal(run(model, family), bare)
    save_adapter(graft, tmp_path / "ours")
    torch.testing.assert_close(loaded_by_peft(family, tmp_path / "ours"), expected, **CLOSE)
    again = model_of(family)
    load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(run(again, family), expected, **CLOSE)


OURS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 3, "lora_alpha": 5},
    "attention": {"name": "lora", "r": 2, "target_modules": "attention"},
    "rslora": {"name": "lora", "r": 2, "use_rslora": True},
    "dora": {"name": "lora", "r": 2, "use_dora": True},
    "pissa": {"name": "lora", "r": 2, "init_lora_weights": "pissa"},
    "rs pissa": {"name": "lora", "r": 2, "init_lora_weights": "pissa", "use_rslora": True},
    "ia3": {"name": "ia3"},
    "miss": {"name": "miss", "r": 5},
    "miss mini": {"name": "miss", "r": 3, "init_weights": "mini", "mini_r": 2},
    "miss bat": {"name": "miss", "r": 4, "init_weights": "bat", "target_modules": "attention"},
    "hira": {"name": "hira", "r": 2},
    "shira": {"name": "shira", "r": 2},
    "shira seed": {"name": "shira", "r": 2, "random_seed": 7, "layers": "top-1"},
    "oft": {"name": "oft", "oft_block_size": 4},
    "oft exact": {"name": "oft", "r": 2, "use_cayley_neumann": False},
    "oft shared": {"name": "oft", "oft_block_size": 8, "block_share": True, "layers": "top-1"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 3, "encoder_hidden_size": 6},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prefix mlp": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
}


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method in OURS for family in ATTENTION if (method, family) not in REFUSED],
)
def test_save_adapter_gives_equal_outputs_in_peft(method: str, family: str, tmp_path: Path) -> None:
    model = model_of(family)
    torch.manual_seed(4)
    graft = gw.attach(model, parse_method(OURS[method]))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # T5 makes much of rounding when outputs are far away
    expected = run(model, family)
    assert not torch.allclose(expected, run(model_of(family), family), atol=1e-3)
    save_adapter(graft, tmp_path / "adapter")
    torch.testing.assert_close(loaded_by_peft(family, tmp_path / "adapter"), expected, **CLOSE)


@pytest.mark.parametrize("method", ["miss", "shira", "oft"])
def test_save_adapter_method_unsupported_by_peft_on_conv1d_uses_graftwerk_type(method: str, tmp_path: Path) -> None:
    model = model_of("gpt2")
    adapter = gw.attach(model, parse_method(OURS[method]))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = run(model, "gpt2")
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == f"GRAFTWERK_{method.upper()}"
    fresh = model_of("gpt2")
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(run(fresh, "gpt2"), expected, **CLOSE)


def test_shira_random_seed_selects_entries_of_peft(tmp_path: Path) -> None:
    made_by_peft(CONFIGS["shira seed"]("llama"), "llama", tmp_path)
    theirs = load_adapter(model_of("llama"), tmp_path).state_dict()
    settings = {"name": "shira", "r": 2, "random_seed": 7, "target_modules": ATTENTION["llama"]}
    ours = gw.attach(model_of("llama"), parse_method(settings)).state_dict()
    indices = [key for key in ours if key.endswith("shira_indices")]
    assert len(indices) == 4
    assert all(torch.equal(ours[key], theirs[key]) for key in indices)


def test_load_adapter_shira_indices_out_of_range_raise(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made_by_peft(CONFIGS["shira"]("llama"), "llama", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("shira_indices"))
    for changed, words in ((tensors[key] - 1, "points outside"), (tensors[key][:, 1:], "mis-shaped")):
        save_file({**tensors, key: changed.contiguous()}, file)
        with pytest.raises(AdapterError, match=words):
            load_adapter(model_of("llama"), tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ("oft", {"peft_version": "0.17.1"}, "another series"),
        ("oft", {"peft_version": None}, "another series"),
        ("oft", {"coft": True}, "COFT"),
        ("oft", {"bias": "oft_only"}, "biases of the base were trained"),
        ("miss", {"bias": "MiSS_only"}, "biases of the base were trained"),
    ],
)
def test_load_adapter_unsupported_variant_of_oft_or_miss_raises(
    config: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made_by_peft(CONFIGS[config]("llama"), "llama", tmp_path)
    with pytest.raises(UnsupportedError, match=words):
        load_adapter(model_of("llama"), edited(tmp_path, **changes))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_load_adapter_peft_prefix_on_bert_or_t5_raises(family: str, tmp_path: Path) -> None:
    made_by_peft(CONFIGS["prefix"](family), family, tmp_path)
    model = model_of(family)
    before = run(model, family)
    reason = {"bert": "moves the positions", "t5": "trains only half"}[family]
    with pytest.raises(UnsupportedError, match=reason):
        load_adapter(model, tmp_path)
    assert torch.equal(run(model, family), before)


def test_prefix_under_sliding_window_uses_graftwerk_type(tmp_path: Path) -> None:
    made_by_peft(CONFIGS["prefix"]("mistral"), "mistral", tmp_path / "theirs")
    model = model_of("mistral")
    with pytest.raises(UnsupportedError, match="sliding"):
        load_adapter(model, tmp_path / "theirs")
    graft = gw.attach(model, parse_method("prefix"))
    save_adapter(graft, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "GRAFTWERK_PREFIX"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("config", ["lora", "prompt", "prefix"])
def test_load_adapter_decoder_with_classifier_roundtrip_with_peft(config: str, family: str, tmp_path: Path) -> None:
    kind = FAMILIES[family]
    settings = CONFIGS[config](family)
    settings.task_type = "SEQ_CLS"
    model = peft.get_peft_model(kind.build(classifier=True), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(tmp_path / "theirs"))
    batch = kind.batch(padded=False)  # PEFT's prompts lose which token is the last where rows are padded
    expected = model(**batch).logits
    ours = kind.build(classifier=True)
    graft = load_adapter(ours, tmp_path / "theirs")
    assert graft.heads == ("score",)
    torch.testing.assert_close(ours(**batch).logits, expected, **CLOSE)
    save_adapter(graft, tmp_path / "ours")
    back = PeftModel.from_pretrained(kind.build(classifier=True), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(**batch).logits, expected, **CLOSE)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_load_adapter_heads_of_several_layers_roundtrip_with_peft(family: str, tmp_path: Path) -> None:
    targets = ["q_lin"] if family == "distilbert" else ["query"]
    expected = made_by_peft(LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=2), family, tmp_path / "theirs")
    model = model_of(family)
    graft = load_adapter(model, tmp_path / "theirs", trainable=True)
    assert graft.num_head_parameters > 17 * 3
    torch.testing.assert_close(run(model, family), expected, **CLOSE)
    save_adapter(graft, tmp_path / "ours")
    torch.testing.assert_close(loaded_by_peft(family, tmp_path / "ours"), expected, **CLOSE)


def test_load_adapter_peft_named_adapter_hints_at_subfolder(tmp_path: Path) -> None:
    model = peft.get_peft_model(model_of("bert"), lora("bert"), adapter_name="legal")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"no adapter_config\.json") as caught:
        load_adapter(model_of("bert"), tmp_path)
    assert "legal" in str(caught.value.hint)
    assert load_adapter(model_of("bert"), tmp_path / "legal").name == "default"


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_load_adapter_unsupported_lora_variant_raises(tmp_path: Path) -> None:
    made_by_peft(lora("llama"), "llama", tmp_path)
    for key, value in {
        "use_qalora": True,
        "alora_invocation_tokens": [1, 2],
        "layer_replication": [[0, 1], [0, 1]],
        "lora_bias": True,
        "kasa_config": {"beta": 0.1},
        "bias": "all",
        "init_lora_weights": "olora",
    }.items():
        with pytest.raises(UnsupportedError, match=key):
            load_adapter(model_of("llama"), edited(tmp_path, **{key: value}))
        edited(tmp_path, **{key: lora("llama").to_dict()[key]})
    load_adapter(model_of("llama"), tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_load_adapter_peft_trained_biases_raise(bias: str, tmp_path: Path) -> None:
    made_by_peft(lora("bert", bias=bias), "bert", tmp_path)
    with pytest.raises(UnsupportedError, match="biases of the base were trained"):
        load_adapter(model_of("bert"), tmp_path)


def test_load_adapter_options_without_effect_are_accepted(tmp_path: Path) -> None:
    """Ways to start, once trained: orthogonal, EVA. And switches of newer versions that are off."""
    expected = made_by_peft(lora("llama", init_lora_weights="orthogonal"), "llama", tmp_path)
    edited(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0}, some_future_switch=None, another=False)
    edited(
        tmp_path, future_count=0, future_scale=0.0, future_kind="none", future_text="", future_rows=[], future_map={}
    )
    model = model_of("llama")
    load_adapter(model, tmp_path)
    torch.testing.assert_close(run(model, "llama"), expected, **CLOSE)
    torch.testing.assert_close(loaded_by_peft("llama", tmp_path), expected, **CLOSE)


def test_load_adapter_unsupported_peft_type_raises(tmp_path: Path) -> None:
    made_by_peft(peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "llama", tmp_path)
    with pytest.raises(UnsupportedError, match="LOHA"):
        load_adapter(model_of("llama"), tmp_path)


def test_save_adapter_target_modules_are_short_and_exact(tmp_path: Path) -> None:
    """`output.dense` ends the attention too; PEFT must not adapt it when only the feed-forward is meant."""
    model = model_of("bert")
    save_adapter(gw.attach(model, parse_method("ia3")), tmp_path / "ia3")
    config = json.loads((tmp_path / "ia3" / "adapter_config.json").read_text())
    assert config["feedforward_modules"] == ["0.output.dense", "1.output.dense"]
    assert config["target_modules"] == ["0.output.dense", "1.output.dense", "key", "value"]
