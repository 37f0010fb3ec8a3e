"""The fingerprint names the pretrained weights: nothing that a task or an adapter adds, everything that they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from graftwerk.errors import ModelError
from graftwerk.serialization import fingerprint as module
from graftwerk.serialization.fingerprint import fingerprint

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
SIBLINGS = [
    (tf.BertConfig(**SIZES), "Bert", ["ForMaskedLM", "Model", "ForSequenceClassification", "ForTokenClassification"]),
    (tf.RobertaConfig(**SIZES), "Roberta", ["ForMaskedLM", "Model", "ForSequenceClassification"]),
    (tf.DistilBertConfig(**DISTIL), "DistilBert", ["ForMaskedLM", "Model", "ForSequenceClassification"]),
    (tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4), "GPT2", ["LMHeadModel", "Model"]),
    (tf.LlamaConfig(**SIZES), "Llama", ["ForCausalLM", "Model", "ForSequenceClassification"]),
    (tf.LlamaConfig(**SIZES, tie_word_embeddings=True), "Llama", ["ForCausalLM", "Model"]),
    (tf.T5Config(**T5), "T5", ["ForConditionalGeneration", "Model", "ForSequenceClassification"]),
    (tf.BartConfig(**BART), "Bart", ["ForConditionalGeneration", "Model", "ForSequenceClassification"]),
]


@pytest.mark.parametrize(("config", "family", "classes"), SIBLINGS, ids=[family for _, family, _ in SIBLINGS])
def test_fingerprint_equal_for_every_model_class_of_a_checkpoint(
    config: tf.PretrainedConfig, family: str, classes: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    getattr(tf, family + classes[0])(config).save_pretrained(tmp_path)
    found = set()
    for seed, name in enumerate(classes):
        torch.manual_seed(seed)  # heads and poolers that the checkpoint lacks are drawn anew
        found.add(fingerprint(getattr(tf, family + name).from_pretrained(tmp_path)))
    assert len(found) == 1
    torch.manual_seed(99)
    assert fingerprint(getattr(tf, family + classes[0])(config)) not in found


def bert(seed: int = 0) -> tf.BertModel:
    torch.manual_seed(seed)
    return tf.BertModel(tf.BertConfig(**SIZES))


def test_fingerprint_equal_in_float32_and_bfloat16() -> None:
    assert fingerprint(bert()) == fingerprint(bert().to(torch.bfloat16))


def test_fingerprint_changes_with_one_weight_of_any_small_tensor() -> None:
    model = bert()
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        if "pooler" in name:
            continue
        with torch.no_grad():
            place = parameter.view(-1)[-1:]
            old = place.clone()
            place.add_(1.0)
            assert fingerprint(model) != before, name
            place.copy_(old)
    assert fingerprint(model) == before


def test_fingerprint_differs_with_another_number_of_layers() -> None:
    assert fingerprint(bert()) != fingerprint(tf.BertModel(tf.BertConfig(**{**SIZES, "num_hidden_layers": 1})))


def test_sample_large_tensor_spans_first_to_last_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 7)
    for numel in (1, 6, 7, 8, 50, 1000):
        values = torch.arange(numel, dtype=torch.float32)
        sample = torch.frombuffer(bytearray(module._sample(values)), dtype=torch.bfloat16)
        assert 1 <= len(sample) <= 7
        assert len(sample) >= min(numel, 4)
        assert sample[0] == 0
        assert float(sample[-1]) >= 0.7 * (numel - 1)


def test_fingerprint_is_cached_until_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    calls = []
    sample = module._sample
    monkeypatch.setattr(module, "_sample", lambda parameter: calls.append(1) or sample(parameter))
    first = fingerprint(model)
    count = len(calls)
    assert count > 0
    assert fingerprint(model) == first
    assert len(calls) == count
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    assert fingerprint(model) != first
    model.encoder.layer[0].output.dense.weight = torch.nn.Parameter(torch.zeros(16, 24))
    assert fingerprint(model) != first
    assert len(calls) > count


def test_fingerprint_meta_tensors_raise() -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig(**SIZES))
    with pytest.raises(ModelError, match="not loaded"):
        fingerprint(model)
