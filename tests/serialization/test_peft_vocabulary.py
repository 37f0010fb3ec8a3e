"""PEFT's folders with embeddings in them, `lm_head` as a target, expressions; and models without `input_ids`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, ConfigError, UnsupportedError
from graftwerk.methods.lora import LoRA
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.families import FAMILIES
from tests.serialization.peft_models import load_in_peft, save_peft_adapter

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "t5": "lm_head", "bert": "decoder"}
TABLE = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared", "bert": "word_embeddings"}
TARGET = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q", "bert": "query"}


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base on disk: PEFT compares its vocabulary with that of the adapted model."""
    FAMILIES[request.param].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base: Path, family: str, *, tokens: int = 64) -> Any:
    model = getattr(tf, FAMILIES[family].lm).from_pretrained(base).eval()
    if tokens != 64:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(tokens)
    return model


def run(model: Any, family: str) -> Tensor:
    batch = FAMILIES[family].batch()
    batch["input_ids"][:, 1] = model.config.vocab_size - 1  # a token that only a resized base knows
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def made_by_peft(base: Path, family: str, folder: Path, *, tokens: int = 64, **settings: Any) -> Tensor:
    settings = {"r": 4, "target_modules": [TARGET[family]], "fan_in_fan_out": family == "gpt2", **settings}
    model = opened(base, family, tokens=tokens)
    return run(save_peft_adapter(model, peft.LoraConfig(**settings), folder, scale=0.1), family)


def loaded_by_peft(model: Any, family: str, folder: Path) -> Tensor:
    return run(load_in_peft(model, folder), family)


CASES: dict[str, dict[str, Any]] = {
    "resized": {"tokens": 70},
    "resized, saved": {"tokens": 70, "saved": True},
    "saved": {"saved": True},
    "head": {"head": True},
    "head, resized": {"tokens": 70, "head": True},
    "head alone, resized": {"tokens": 70, "head": True, "alone": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("base", "family"), [(family, family) for family in TABLE], indirect=["base"])
def test_load_adapter_peft_embeddings_and_head_roundtrip(base: Path, family: str, case: str, tmp_path: Path) -> None:
    asked = dict(CASES[case])
    tokens, settings = asked.pop("tokens", 64), {}
    if asked.get("saved"):
        settings["modules_to_save"] = [TABLE[family], HEAD[family]]
    if asked.get("head"):
        settings["target_modules"] = [HEAD[family]] if asked.get("alone") else [TARGET[family], HEAD[family]]
    expected = made_by_peft(base, family, tmp_path / "theirs", tokens=tokens, **settings)
    torch.manual_seed(8)  # other new rows than those that PEFT's model began with
    model = opened(base, family, tokens=tokens)
    torch.manual_seed(8)
    reference = loaded_by_peft(opened(base, family, tokens=tokens), family, tmp_path / "theirs")
    if case == "resized, saved" or tokens == 64:
        torch.testing.assert_close(reference, expected, **CLOSE)
    bare = run(model, family)
    # PEFT stores no input embedding beside an adapted head, so the new rows are whatever this load has drawn.
    force = tokens != 64 and bool(asked.get("head"))
    graft = load_adapter(model, tmp_path / "theirs", force=force)
    torch.testing.assert_close(run(model, family), reference, **CLOSE)
    with gw.disabled(model):
        assert torch.equal(run(model, family), bare)
    save_adapter(graft, tmp_path / "ours")
    torch.manual_seed(8)
    again = opened(base, family, tokens=tokens)
    load_adapter(again, tmp_path / "ours", force=force)
    torch.testing.assert_close(run(again, family), reference, **CLOSE)
    if not asked.get("alone"):  # then nothing but a saved module is left of it, which PEFT has no kind for
        torch.manual_seed(8)
        theirs = loaded_by_peft(opened(base, family, tokens=tokens), family, tmp_path / "ours")
        torch.testing.assert_close(theirs, reference, **CLOSE)


@pytest.mark.parametrize(("base", "saved"), [("llama", True), ("llama", False)], indirect=["base"])
def test_load_adapter_vocabulary_of_other_size_hints_at_resize(base: Path, saved: bool, tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved else {"target_modules": ["q_proj", "lm_head"]}
    made_by_peft(base, "llama", tmp_path / "theirs", tokens=70, **settings)
    with pytest.raises(AdapterError) as caught:
        load_adapter(opened(base, "llama"), tmp_path / "theirs")
    assert "resize_token_embeddings(70)" in (caught.value.hint or "")


@pytest.mark.parametrize(("base", "family"), [(family, family) for family in TABLE], indirect=["base"])
def test_lm_head_as_target_equals_peft_and_merges_if_untied(base: Path, family: str, tmp_path: Path) -> None:
    """It is adapted where it is named, and only then; a tied one cannot be merged."""
    model = opened(base, family)
    everything = gw.attach(model, LoRA(r=2), "all")
    assert not any(path.endswith(HEAD[family]) for path in everything.hosts)
    everything.delete()
    torch.manual_seed(1)
    graft = gw.attach(model, LoRA(r=2, target_modules=[TARGET[family], HEAD[family]]))
    assert any(path.endswith(HEAD[family]) for path in graft.hosts)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = run(model, family)
    save_adapter(graft, tmp_path / "a")
    torch.testing.assert_close(loaded_by_peft(opened(base, family), family, tmp_path / "a"), expected, **CLOSE)
    if family == "llama":
        graft.merge()
        torch.testing.assert_close(run(model, family), expected, **CLOSE)
    else:
        with pytest.raises(UnsupportedError, match="tied"):
            graft.merge()


def test_target_name_does_not_match_layers_outside_base_model() -> None:
    model = FAMILIES["bert"].build()
    graft = gw.attach(model, LoRA(r=2, target_modules=["dense"]))
    assert all(path.startswith("bert.") for path in graft.hosts)


@pytest.mark.parametrize(
    ("setting", "base", "settings"),
    [
        ("target_modules", "llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("lora_bias", "llama", {"lora_bias": True}),
        ("bias", "bert", {"bias": "all"}),
        ("bias", "bert", {"bias": "lora_only"}),
        ("ensure_weight_tying", "gpt2", {"modules_to_save": ["wte"], "ensure_weight_tying": True}),
    ],
    indirect=["base"],
)
def test_load_adapter_unsupported_setting_raises_with_its_name(
    base: Path, setting: str, settings: Any, tmp_path: Path
) -> None:
    family = tf.AutoConfig.from_pretrained(base).model_type
    made_by_peft(base, family, tmp_path / "theirs", **settings)
    with pytest.raises(UnsupportedError, match=f"`{setting}`"):
        load_adapter(opened(base, family), tmp_path / "theirs")


def test_load_adapter_rank_pattern_regex_equals_peft(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")
    expected = made_by_peft(
        tmp_path / "base", "llama", tmp_path / "theirs", target_modules=["q_proj", "k_proj", "v_proj"], lora_alpha=3,
        rank_pattern={r"layers\.[01]\..*(q|k)_proj": 2}, alpha_pattern={r".*\.(?:k|v)_pro\w": 7, r"layers.\d+.*": 5},
    )  # fmt: skip
    model = opened(tmp_path / "base", "llama")
    graft = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(run(model, "llama"), expected, **CLOSE)
    save_adapter(graft, tmp_path / "ours")
    again = loaded_by_peft(opened(tmp_path / "base", "llama"), "llama", tmp_path / "ours")
    torch.testing.assert_close(again, expected, **CLOSE)


# -- speech and images: no `input_ids` ---------------------------------------------------------------------------------

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CONV = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
SPEECH = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 64, "max_target_positions": 32, **TOKENS,
}  # fmt: skip
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _speech(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    decoder = {"decoder_input_ids": torch.randint(3, 64, (2, 5), generator=draw)}
    if name == "whisper":
        config = tf.WhisperConfig(**SPEECH, num_mel_bins=8, max_source_positions=20)
        model: Any = tf.WhisperForConditionalGeneration(config)
        inputs = {"input_features": torch.randn(2, 8, 40, generator=draw), **decoder}
    elif name == "whisper classifier":
        config = tf.WhisperConfig(**SPEECH, num_mel_bins=8, max_source_positions=20, classifier_proj_size=8)
        model = tf.WhisperForAudioClassification(config)
        inputs = {"input_features": torch.randn(2, 8, 40, generator=draw)}
    elif name == "speech_to_text":
        config = tf.Speech2TextConfig(**SPEECH, input_feat_per_channel=8, conv_channels=8, max_source_positions=80)
        model = tf.Speech2TextForConditionalGeneration(config)
        inputs = {"input_features": torch.randn(2, 40, 8, generator=draw), **decoder}
    elif name == "vit":
        config = tf.ViTConfig(**ENCODER, image_size=8, patch_size=4)
        model, inputs = tf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8, generator=draw)}
    else:
        cls = {"wav2vec2 ctc": tf.Wav2Vec2ForCTC, "wav2vec2": tf.Wav2Vec2ForSequenceClassification}[name]
        config = tf.Wav2Vec2Config(**ENCODER, **CONV, vocab_size=64, classifier_proj_size=8, **TOKENS)
        model, inputs = cls(config), {"input_values": torch.randn(2, 400, generator=draw)}
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model, inputs


@pytest.mark.parametrize("method", ["lora", "ia3", "saved"])
@pytest.mark.parametrize("name", ["whisper", "whisper classifier", "speech_to_text", "wav2vec2 ctc", "wav2vec2", "vit"])
def test_models_without_input_ids_roundtrip_with_peft(name: str, method: str, tmp_path: Path) -> None:
    model, inputs = _speech(name)
    targets = ["q_proj", "v_proj"]
    asked: dict[str, Any] = {"name": "lora", "r": 2, "target_modules": targets}
    if method == "ia3":
        asked = {"name": "ia3", "target_modules": targets, "feedforward_modules": targets[1:]}
    elif method == "saved":
        asked["modules_to_save"] = ["layers.1"]
    graft = gw.attach(model, parse_method(asked))
    with torch.no_grad():
        for number, parameter in enumerate(graft.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
        expected = model(**inputs).logits
    save_adapter(graft, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(_speech(name)[0], str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, expected, **CLOSE)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = _speech(name)[0]
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, **CLOSE)


def test_attach_unknown_target_raises() -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        gw.attach(FAMILIES["llama"].build(), LoRA(target_modules=["nothing"]))
