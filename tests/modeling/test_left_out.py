"""Methods say which weights they do not reach on a model."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf

import graftwerk.modeling.attach as gw
from graftwerk.methods.lora import LoRA
from tests.families import FAMILIES
from tests.modeling.unusual import S, built


def test_left_out_all_linear_names_fused_experts_and_share() -> None:
    model = built("MixtralForCausalLM", tf.MixtralConfig(**S, num_key_value_heads=2, num_local_experts=4))
    graft = gw.attach(model, LoRA(r=2))
    (text,) = graft.left_out()
    attention = 2 * (2 * 16 * 16 + 2 * 16 * 8)
    experts = 2 * 4 * 3 * 16 * 24
    share = 100 * attention / (attention + experts + 2 * 4 * 16)
    assert text.startswith("6 of 14 weight matrices")
    assert "2 x experts.gate_up_proj, 2 x experts.down_proj" in text
    assert f"reached: {share:.0f} %" in text
    assert text in str(graft)


def test_left_out_all_linear_names_bare_parameters() -> None:
    config = tf.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24)
    (text,) = gw.attach(built("XLNetForSequenceClassification", config), LoRA(r=2)).left_out()
    assert "2 x rel_attn.q" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_all_linear_is_empty_on_listed_families(family: str) -> None:
    graft = gw.attach(FAMILIES[family].build(), LoRA(r=2))
    assert graft.left_out() == []
    assert "leaves out" not in str(graft)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj"]}, {"target_modules": "attention"}])
def test_left_out_by_user_is_not_listed(settings: dict[str, Any]) -> None:
    assert gw.attach(FAMILIES["llama"].build(), LoRA(r=2, **settings)).left_out() == []
