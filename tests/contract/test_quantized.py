"""Every method on a base in 4 and in 8 bits: what it would compute on the full weights that the codes stand for."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import graftwerk.modeling.attach as gw
from graftwerk.errors import UnsupportedError
from graftwerk.kernels import flags
from graftwerk.kernels.fused_lora import can_fuse
from graftwerk.methods.base_weights import is_quantized
from graftwerk.methods.full import Full
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.quantized_layers import dequantize, quantization_of
from graftwerk.models.load import _let_go_of_files
from tests.contract.cases import METHODS, method_of, perturb

pytest.importorskip("bitsandbytes")
ABLE = [method for method in METHODS if method != "full"]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """The kind, a Llama quantized in it (with biases, so that BitFit has some), and its dequantized twin."""
    from graftwerk.modeling.quantize import quantizer

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    perturb((parameter for name, parameter in model.named_parameters() if name.endswith("bias")), 1)
    model.save_pretrained(folder)
    made = quantizer(request.param, double_quant=True, compute=torch.float32)
    place = {"": torch.device("cpu")}
    quantized = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, quantization_config=made, device_map=place
    ).eval()
    full = copy.deepcopy(quantized)
    dequantize(full)
    return request.param, quantized, full


def _answers(model: Any, method: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits (B, C) with the adapter moved from its start, and the gradients of its parameters."""
    torch.manual_seed(5)
    adapter = gw.attach(model, method_of(method))
    perturb(adapter.parameters(), 7, scale=0.1)
    logits = model(**batch).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    gw.activate(model, rows=["default", None, "default"])
    with torch.no_grad():
        rows = model(**batch).logits
    gw.detach(model)
    return torch.cat((logits.detach(), rows)), grads


@pytest.mark.parametrize("method", ABLE)
def test_method_on_quantized_base_equals_the_dequantized_weights(method: str, bases: tuple[str, Any, Any]) -> None:
    _, quantized, full = bases
    batch = {"input_ids": torch.randint(1, 96, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    ours, our_grads = _answers(quantized, method, batch)
    plain, grads = _answers(full, method, batch)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-5, rtol=1e-3, msg=name)
    assert any(grad.abs().max() > 1e-4 for grad in grads.values())


def test_quantized_base_trains_no_codes_and_names_itself(bases: tuple[str, Any, Any]) -> None:
    kind, quantized, full = bases
    said = quantization_of(quantized)
    assert said is not None
    assert (said["name"], said["double_quant"], said["skip"]) == (kind, True if kind == "nf4" else None, ["score"])
    assert quantization_of(full) is None
    layers = [layer.weight for name, layer in quantized.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    assert all(is_quantized(weight) for weight in layers)
    with pytest.raises(UnsupportedError, match="is quantized") as caught:
        gw.attach(quantized, Full())
    assert caught.value.hint
    with pytest.raises(UnsupportedError, match=r"`model.layers.0.mlp` is quantized, so that no copy") as caught:
        gw.attach(quantized, LoRA(modules_to_save=("model.layers.0.mlp",)))
    assert "skip" in str(caught.value.hint)
    gw.attach(quantized, LoRA(r=2))
    with pytest.raises(UnsupportedError, match="-bit base: rounding would lose it") as caught:
        gw.adapters(quantized)["default"].merge()
    assert "graftwerk merge" in str(caught.value.hint)
    gw.detach(quantized)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_conv1d_of_gpt2_equals_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    from graftwerk.modeling.quantize import quantizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=64, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantizer(kind, double_quant=True, compute=torch.float32)
    ).eval()
    layers = {name.split(".")[-2] for name, weight in quantized.named_parameters() if is_quantized(weight)}
    assert layers == {"c_attn", "c_proj", "c_fc"}
    assert (quantized.transformer.h[0].mlp.c_fc.in_features, quantized.lm_head.weight.dtype) == (64, torch.float32)
    full = copy.deepcopy(quantized)
    dequantize(full)
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids).logits, full(ids).logits, atol=1e-5, rtol=1e-4)


def test_int8_answers_of_a_row_do_not_depend_on_the_rows_beside_it(bases: tuple[str, Any, Any]) -> None:
    _, quantized, _ = bases
    ids = torch.randint(1, 96, (3, 9))
    with torch.no_grad():
        together, alone = quantized(input_ids=ids).logits, quantized(input_ids=ids[:1]).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)
    assert (quantized.train()(input_ids=ids).logits - together).abs().max() < 1e-6
    quantized.eval()


def test_lora_on_quantized_base_is_fused_under_autocast(bases: tuple[str, Any, Any]) -> None:
    _, quantized, _ = bases
    torch.manual_seed(5)
    adapter = gw.attach(quantized, method_of("lora"))
    perturb(adapter.parameters(), 7, scale=0.1)
    ids = torch.randint(1, 96, (3, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert can_fuse(quantized.model.layers[0].mlp.up_proj, torch.ones(1, 32))
        fused = quantized(input_ids=ids).logits.float()
        with flags.plain():
            plain = quantized(input_ids=ids).logits.float()
    torch.testing.assert_close(fused, plain, atol=0.05, rtol=0.05)
    gw.detach(quantized)


def test_attach_keeps_4_bits_of_users_unpacked_and_refuses_packed_ones(tmp_path: Path) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes packs codes in evaluation, and gradients would be lost."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    quantized = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ).eval()
    layers = [layer for layer in quantized.modules() if isinstance(layer, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    adapter = gw.attach(quantized, LoRA(r=2, target_modules=("q_proj", "down_proj")))
    batch = {"input_ids": torch.randint(1, 96, (3, 9)), "labels": torch.tensor([0, 1, 1])}
    with torch.no_grad():
        quantized(**batch)
    quantized.train()(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert not any(hasattr(layer.weight.quant_state, "packing_format_for_cpu") for layer in layers)
    gw.detach(quantized)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    packed = layers[-1].weight
    packed.data, _ = _convert_weight_packed_for_cpu(packed.data, packed.quant_state)
    with pytest.raises(UnsupportedError, match="has packed this 4-bit layer") as caught:
        gw.attach(quantized, LoRA(r=2))
    assert caught.value.where == "model.layers.0.mlp.down_proj"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
def test_quantized_base_lets_go_of_its_file_with_its_buffers(tmp_path: Path) -> None:
    from graftwerk.modeling.quantize import quantizer

    config = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    made = quantizer("nf4", double_quant=True, compute=torch.float32)
    model = BartForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=made, device_map={"": torch.device("cpu")}
    )
    _let_go_of_files(model)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
