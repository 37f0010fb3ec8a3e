"""An adapter per row is right or refused, whatever dimension of a layer's input holds the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import UnsupportedError
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.module_names import BY_TYPE
from graftwerk.modeling.row_dims import _BATCH_FIRST, _SEQUENCE_FIRST
from tests.modeling.unusual import PATCHES, S, answer, built, moved, token_ids

XLNET: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}
LED: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "attention_window": [4, 4],
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def globally(ids: Tensor) -> dict[str, Tensor]:
    """The first token sees all: the projections for global attention are used too."""
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    return {"input_ids": ids, "global_attention_mask": mask}


# Of 2 rows and 8 tokens, and of 4 rows and 4 tokens: a wrong dimension has a fitting size in both.
SHAPES = pytest.mark.parametrize(("rows", "tokens"), [(2, 8), (4, 4)])


@SHAPES
@pytest.mark.parametrize("settings", [LoRA(r=2), BitFit()], ids=["lora", "bitfit"])
@pytest.mark.parametrize("family", ["xlnet", "longformer", "led"])
def test_rows_of_sequence_first_layers_equal_single_adapters(
    family: str, settings: Any, rows: int, tokens: int
) -> None:
    ids = token_ids(rows, tokens)
    batch = {"input_ids": ids} if family == "xlnet" else globally(ids)
    if family == "xlnet":
        model = built("XLNetForSequenceClassification", tf.XLNetConfig(**XLNET))
    elif family == "longformer":
        config = tf.LongformerConfig(**S, attention_window=[4, 4], pad_token_id=0)
        model = built("LongformerForMaskedLM", config)
    else:
        model = built("LEDForConditionalGeneration", tf.LEDConfig(**LED))
        batch["decoder_input_ids"] = token_ids(rows, 3)
    for name, seed in (("a", 1), ("b", 2)):
        moved(model, settings, name, seed)
    names = ["a", None, "b", "a"][:rows]
    alone = {}
    for name in {*names}:
        gw.activate(model, name)
        alone[name] = answer(model, **batch)
    assert (alone["a"] - alone[None]).abs().max() > 1e-3
    gw.activate(model, rows=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(answer(model, **batch), expected, atol=1e-9, rtol=1e-9)


@SHAPES
@pytest.mark.parametrize(("cls", "config"), [
    ("AlbertForSequenceClassification", tf.AlbertConfig(**S, embedding_size=16)),
    ("FunnelForSequenceClassification", tf.FunnelConfig(vocab_size=64, d_model=16, block_sizes=[1, 1], n_head=4,
    d_head=4, d_inner=24)),
    ("FalconForCausalLM", tf.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)),
    ("MobileBertForMaskedLM", tf.MobileBertConfig(**S, embedding_size=16, intra_bottleneck_size=8,
    true_hidden_size=8)),
    ("MambaForCausalLM", tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)),
    ("Qwen2MoeForCausalLM", tf.Qwen2MoeConfig(**S, num_key_value_heads=2, num_experts=4, moe_intermediate_size=8,
    shared_expert_intermediate_size=8)),
    ("MixtralForCausalLM", tf.MixtralConfig(**S, num_key_value_heads=2, num_local_experts=4)),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_rows_of_batch_first_layers_equal_single_adapters(cls: str, config: Any, rows: int, tokens: int) -> None:
    model, ids = built(cls, config).float(), token_ids(rows, tokens)
    for name, seed in (("a", 1), ("b", 2)):
        moved(model, LoRA(r=2), name, seed)
    model.float()  # fused experts take no float64
    names = ["a", None, "b", "a"][:rows]
    alone = {}
    for name in {*names}:
        gw.activate(model, name)
        alone[name] = answer(model, input_ids=ids)
    assert (alone["a"] - alone[None]).abs().max() > 1e-3
    gw.activate(model, rows=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(answer(model, input_ids=ids), expected, atol=1e-4, rtol=1e-4)


def test_every_listed_architecture_has_known_rows() -> None:
    assert set(BY_TYPE) <= _BATCH_FIRST
    assert not _BATCH_FIRST & set(_SEQUENCE_FIRST)


@pytest.mark.parametrize(("cls", "config", "why"), [
    ("DebertaV2ForSequenceClassification", tf.DebertaV2Config(**S, relative_attention=True,
    pos_att_type=["p2c", "c2p"]), "position embeddings"),
    ("SwitchTransformersForConditionalGeneration", tf.SwitchTransformersConfig(vocab_size=64, d_model=16, d_kv=4,
    d_ff=24, num_layers=2, num_heads=4, num_experts=2), "experts"),
    ("CLIPModel", tf.CLIPConfig(text_config=S, vision_config=PATCHES), "not known"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_rows_on_unlisted_architecture_raise(cls: str, config: Any, why: str) -> None:
    model = built(cls, config)
    moved(model, LoRA(r=2))
    with pytest.raises(
        UnsupportedError, match=rf"cannot differ by row on a model of type `{config.model_type}`.*{why}"
    ):
        gw.activate(model, rows=["a", None])
    assert gw.adapters(model)["a"].active


def test_rows_with_sequence_first_saved_module_raise() -> None:
    model = built("XLNetModel", tf.XLNetConfig(**XLNET))
    moved(model, LoRA(r=2, target_modules=["layer.0.ff.layer_1"], modules_to_save=["layer.1.ff"]))
    with pytest.raises(UnsupportedError, match=r"`layer\.1\.ff`, which is trained whole"):
        gw.activate(model, rows=["a", None])
