"""Layers that are no plain linear layers: left out by default, refused or right when they are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.linear_probe import Probe
from graftwerk.methods.lora import LoRA
from graftwerk.methods.registry import METHODS
from graftwerk.modeling.layer_checks import adds_bias_last, unfit
from tests.modeling.unusual import PATCHES, S, answer, built, moved, token_ids


def llama4() -> Any:
    return built(
        "Llama4ForCausalLM",
        tf.Llama4TextConfig(
            **S, num_key_value_heads=2, head_dim=4, intermediate_size_mlp=24, num_local_experts=4,
            interleave_moe_layer_step=2,
        ),
    )  # fmt: skip


def phimoe() -> Any:
    return built("PhimoeForCausalLM", tf.PhimoeConfig(**S, num_key_value_heads=2, num_local_experts=4))


@pytest.mark.parametrize("make", [llama4, phimoe])
def test_attach_router_returning_tuple_is_skipped_and_raises_by_name(make: Any) -> None:
    model = make().float()
    graft = moved(model, LoRA(r=2))
    model.float()
    assert graft.targets
    assert not [place.path for place in graft.targets if "router" in place.path]
    answer(model, input_ids=token_ids())
    gw.detach(model)
    with pytest.raises(
        UnsupportedError, match=r"no adapter works in `.*router`: its class \w+ computes something else"
    ):
        gw.attach(model, LoRA(target_modules=["router"]))


def mamba() -> tuple[Any, dict[str, Any], str]:
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    return built("MambaForCausalLM", config), {"input_ids": token_ids()}, "dt_proj"


def falcon_mamba() -> tuple[Any, dict[str, Any], str]:
    config = tf.FalconMambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    return built("FalconMambaForCausalLM", config), {"input_ids": token_ids()}, "dt_proj"


def siglip() -> tuple[Any, dict[str, Any], str]:
    model = built("SiglipModel", tf.SiglipConfig(text_config=S, vision_config=PATCHES))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, {"input_ids": token_ids(), "pixel_values": pixels}, "vision_model.head.attention.out_proj"


def wavlm() -> tuple[Any, dict[str, Any], str]:
    config = tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return built("WavLMModel", config), {"input_values": sound}, "q_proj"


READ = pytest.mark.parametrize("make", [mamba, falcon_mamba, siglip, wavlm])


@READ
def test_attach_weight_only_layer_is_skipped_by_default(make: Any) -> None:
    model, _, target = make()
    ending = target.rpartition(".")[2]
    paths = [place.path for place in gw.attach(model, LoRA(r=2)).targets]
    assert paths
    if make is siglip:
        assert target not in paths
    else:
        assert not [path for path in paths if path.endswith(ending)]


@READ
@pytest.mark.parametrize("method", [LoRA, IA3], ids=["lora", "ia3"])
def test_attach_named_weight_only_layer_equals_merged(make: Any, method: Any) -> None:
    model, batch, target = make()
    base = answer(model, **batch)
    graft = moved(model, method(target_modules=[target]))
    unmerged = answer(model, **batch)
    assert (unmerged - base).abs().max() > 1e-6
    model(**batch)[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in graft.parameters())
    graft.merge()
    torch.testing.assert_close(answer(model, **batch), unmerged, atol=1e-9, rtol=1e-9)
    graft.unmerge()
    with gw.disabled(model):
        # torch's attention multiplies in another order where weights need no gradient: equal but for the last bit.
        torch.testing.assert_close(answer(model, **batch), base, atol=1e-14, rtol=1e-14)
    with pytest.raises(UnsupportedError, match="cannot differ by row"):
        gw.activate(model, rows=["a", None])
    gw.detach(model)
    assert torch.equal(answer(model, **batch), base)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_lora_variants_on_weight_only_layer_equal_merged(options: dict[str, Any]) -> None:
    model, batch, target = mamba()
    base = answer(model, **batch)
    graft = moved(model, LoRA(r=1, target_modules=[target], **options))
    second = moved(model, LoRA(r=1, target_modules=[target], **options), "b", 2)  # attached while the first is active
    graft.activate()
    unmerged = answer(model, **batch)
    assert (unmerged - base).abs().max() > 1e-7
    graft.merge()
    torch.testing.assert_close(answer(model, **batch), unmerged, atol=1e-9, rtol=1e-9)
    graft.unmerge()
    second.delete()


def test_dropout_on_weight_only_layer_raises() -> None:
    model, _, target = mamba()
    with pytest.raises(ConfigError, match="no input to drop from"):
        gw.attach(model, LoRA(target_modules=[target], lora_dropout=0.1))


def test_attach_cross_attention_without_encoder_is_skipped() -> None:
    config = tf.BartConfig(vocab_size=64, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24)
    model = built("BartForCausalLM", config)
    graft = moved(model, LoRA(r=2))
    assert len(graft.targets) == 12
    assert not [place.path for place in graft.targets if "encoder_attn" in place.path]
    with pytest.raises(UnsupportedError, match="this model has no encoder"):
        gw.attach(model, LoRA(target_modules=["encoder_attn.q_proj"]), name="b")
    prefix = moved(model, METHODS["prefix"](num_virtual_tokens=2), "p")
    assert len(prefix.hosts) == 2
    assert answer(model, input_ids=token_ids()).shape == (2, 8, 64)


def test_model_without_linear_layers_raises_but_takes_probe() -> None:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = built("ResNetForImageClassification", config)
    with pytest.raises(UnsupportedError, match="no linear layers outside its head"):
        gw.attach(model, LoRA())
    assert gw.attach(model, Probe()).heads == ("classifier",)


class _Logged(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class _Paired(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), input


def test_unfit_tries_the_forward_of_an_unknown_class() -> None:
    assert unfit(_Logged(5, 7)) is None
    assert "_Doubled" in (unfit(_Doubled(5, 7)) or "")
    assert "_Paired" in (unfit(_Paired(5, 7, bias=False)) or "")


class _ChannelsFirst(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class _Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.weight + self.bias)


def test_adds_bias_last_tries_the_forward_of_an_unknown_class() -> None:
    from transformers.models.deberta.modeling_deberta import DebertaLayerNorm
    from transformers.models.mobilebert.modeling_mobilebert import NoNorm

    assert adds_bias_last(nn.LayerNorm(6))
    assert adds_bias_last(DebertaLayerNorm(6))
    assert adds_bias_last(NoNorm(6))
    before = copy.deepcopy(odd := _ChannelsFirst(6)).state_dict()
    for module in (odd, _ChannelsFirst(3), _Activated(), nn.GroupNorm(2, 6), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1)):
        assert not adds_bias_last(module), type(module)
    assert all(torch.equal(value, before[key]) for key, value in odd.state_dict().items())


def squeezebert() -> tuple[Any, dict[str, Any]]:
    # As many tokens as features: a bias on the wrong dimension would not even fail.
    return built("SqueezeBertModel", tf.SqueezeBertConfig(**S, embedding_size=16)), {"input_ids": token_ids(2, 16)}


def convnext() -> tuple[Any, dict[str, Any]]:
    config = tf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=4, image_size=32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return built("ConvNextForImageClassification", config), {"pixel_values": pixels}


def deberta() -> tuple[Any, dict[str, Any]]:
    return built("DebertaForSequenceClassification", tf.DebertaConfig(**S)), {"input_ids": token_ids()}


def mobilebert() -> tuple[Any, dict[str, Any]]:
    config = tf.MobileBertConfig(**S, embedding_size=16, intra_bottleneck_size=8, true_hidden_size=8)
    return built("MobileBertForSequenceClassification", config), {"input_ids": token_ids()}


@pytest.mark.parametrize(("make", "trained", "missed"), [
    (squeezebert, 2, 16), (convnext, 7, 6), (deberta, 11, 4), (mobilebert, 49, 0),
])  # fmt: skip
def test_bitfit_trains_or_names_every_bias(make: Any, trained: int, missed: int) -> None:
    model, batch = make()
    biases = [name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2].split("_")]
    base = answer(model, **batch)
    graft = moved(model, BitFit())
    heads = [name for name in biases if name.startswith(tuple(graft.heads) or "\0")]
    assert trained + missed == len(biases) - len(heads)
    assert len(graft.targets) == trained
    said = f"leaves out {missed} of {trained + missed} biases"
    assert (said in str(graft)) == (missed > 0)
    unmerged = answer(model, **batch)
    assert (unmerged - base).abs().max() > 1e-6
    graft.merge()
    torch.testing.assert_close(answer(model, **batch), unmerged, atol=1e-9, rtol=1e-9)


def test_bitfit_without_reachable_bias_names_the_others() -> None:
    config = tf.Mamba2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=4, n_groups=1
    )
    with pytest.raises(UnsupportedError, match=r"has none there, but 4 elsewhere.*mixer\.dt_bias"):
        gw.attach(built("Mamba2ForCausalLM", config), BitFit())
