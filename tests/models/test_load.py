"""Base models and tokenizers: heads, types, padding, what is new, what is silent."""

from __future__ import annotations

import gc
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    T5Config,
)

from graftwerk.errors import ConfigError, ModelError, UnsupportedError
from graftwerk.models.load import load_config, load_model, load_tokenizer, newly_initialised
from graftwerk.models.positions import fix_padding, max_length_for, position_limit
from graftwerk.tasks.base import Example, Splits
from graftwerk.tasks.classification import Classification
from tests.families import FAMILIES

TASK = Classification()


def labels(*names: str) -> Splits:
    return Splits([], [], [], names, "none")


def test_load_model_new_head_has_labels_and_is_listed(tiny_encoder: Path) -> None:
    model = load_model(str(tiny_encoder), TASK, labels("a", "b", "c"))
    assert newly_initialised(model) == ("classifier.bias", "classifier.weight")
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert not model.training
    assert model.config._name_or_path == str(tiny_encoder)


def test_load_model_head_follows_seed_and_body_follows_file(tiny_encoder: Path) -> None:
    def load(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(load_model(str(tiny_encoder), TASK, labels("a", "b")).state_dict())

    first, same, other = load(0), load(0), load(1)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert [key for key in first if not torch.equal(first[key], other[key])] == ["classifier.weight"]


def test_load_model_bfloat16_checkpoint_is_exact_in_float32(tiny_decoder: Path) -> None:
    from safetensors.torch import load_file

    model = load_model(str(tiny_decoder), TASK, labels("a", "b"))
    stored = load_file(tiny_decoder / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        if name != "score.weight":
            assert stored[name].dtype == torch.bfloat16
            assert torch.equal(parameter, stored[name].float())


def test_load_model_keeps_head_of_matching_size(tiny_encoder: Path, tmp_path: Path) -> None:
    trained = load_model(str(tiny_encoder), TASK, labels("a", "b", "c"))
    trained.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_encoder / file, tmp_path)
    again = load_model(str(tmp_path), TASK, labels("x", "y", "z"))
    assert newly_initialised(again) == ()
    assert torch.equal(again.classifier.weight, trained.classifier.weight)
    other = load_model(str(tmp_path), TASK, labels("x", "y"))
    assert newly_initialised(other) == ("classifier.bias", "classifier.weight")
    assert other.classifier.out_features == 2


def test_load_model_missing_or_misshapen_weights_raise(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_encoder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    key = "encoder.layer.1.output.dense.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, metadata={"format": "pt"})
    for task in (TASK, None):
        with pytest.raises(ModelError, match=r"lacks 1 weights.*encoder\.layer\.1\.output\.dense\.weight"):
            load_model(str(tmp_path / "model"), task, labels("a", "b"))
    save_file({**tensors, key: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="other shapes"):
        load_model(str(tmp_path / "model"), TASK, labels("a", "b"))


def test_load_model_architecture_without_head_raises(tmp_path: Path) -> None:
    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="`marian` cannot be used for classification"):
        load_model(str(tmp_path), TASK, labels("a", "b"))
    # Bare it loads; its position tables, which no file holds, are not taken for missing weights.
    assert newly_initialised(load_model(str(tmp_path), None, None)) == ()


def test_load_model_missing_pooler_is_independent_of_seed(tmp_path: Path) -> None:
    """Adapters do not store it: a base loaded again for an adapter must be the base that it was trained on."""
    FAMILIES["bert"].build().save_pretrained(tmp_path)  # a masked language model, which has no pooler
    poolers, heads = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_model(str(tmp_path), TASK, labels("a", "b"))
        poolers.append(model.bert.pooler.dense.weight.detach())
        heads.append(model.classifier.weight.detach())
    assert "bert.pooler.dense.weight" in newly_initialised(model)
    assert torch.equal(*poolers)
    assert poolers[0].std() > 0.005
    assert not torch.equal(*heads)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.classifier])
def test_load_model_every_family_ignores_padding(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_model(str(tmp_path), TASK, labels("a", "b", "c"))
    tokenizer = SimpleNamespace(pad_token_id=0, pad_token_type_id=0)
    long, short = Example({"input_ids": [5, 6, 7, 8, 2]}, 0), Example({"input_ids": [9, 2]}, 1)
    with torch.inference_mode():
        together = model(**TASK.collator.collate([long, short], tokenizer)).logits
        alone = model(**TASK.collator.collate([short], tokenizer)).logits
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-6)


def test_load_model_prints_nothing_and_restores_logging(tiny_encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        gc.collect()  # files that earlier tests left in cycles would warn when they are collected here
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            load_tokenizer(str(tiny_encoder))
            load_model(str(tiny_encoder), TASK, labels("a", "b"))
        assert capfd.readouterr() == ("", "")
        assert heard == []
        assert logging.get_verbosity() == logging.WARNING
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_error()


def test_load_tokenizer_without_pad_token_uses_eos(tiny_decoder: Path) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tiny_decoder).pad_token is None
    tokenizer = load_tokenizer(str(tiny_decoder))
    assert tokenizer.pad_token == "</s>"
    model = load_model(str(tiny_decoder), TASK, labels("a", "b"))
    fix_padding(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.eos_token_id


def test_load_tokenizer_without_pad_and_eos_raises(tiny_decoder: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(tiny_decoder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a pad nor an end token"):
        load_tokenizer(str(tmp_path / "model"))


def test_fix_padding_tokenizer_of_other_model_raises(tiny_encoder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_encoder))
    tokenizer.add_tokens(["surplus"])
    with pytest.raises(ModelError, match="301 tokens and the model 300 embeddings"):
        fix_padding(load_model(str(tiny_encoder), TASK, labels("a", "b")), tokenizer)


def test_load_tokenizer_damaged_file_raises_model_error(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    with pytest.raises(ModelError, match="tokenizer of"):
        load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=128), 128),
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (T5Config(), None),
    ],
)
def test_position_limit_known_configurations(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


@pytest.mark.parametrize("kind", ["roberta", "bert", "gpt2", "opt", "electra", "distilbert"])
def test_position_limit_is_longest_length_that_runs(kind: str) -> None:
    from transformers import AutoModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30, "pad_token_id": 1}
    config = AutoConfig.for_model(kind, **small, max_position_embeddings=20)
    limit = position_limit(config)
    assert limit is not None
    model = AutoModel.from_config(config).eval()
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_max_length_for_respects_limits() -> None:
    tokenizer = SimpleNamespace(model_max_length=int(1e30))
    assert max_length_for(BertConfig(max_position_embeddings=128), tokenizer) == 128
    assert max_length_for(LlamaConfig(max_position_embeddings=2048), tokenizer) == 512
    assert max_length_for(LlamaConfig(max_position_embeddings=2048), tokenizer, 1000) == 1000
    assert max_length_for(T5Config(), tokenizer, 4000) == 4000
    assert max_length_for(BertConfig(), SimpleNamespace(model_max_length=256)) == 256
    with pytest.raises(ConfigError, match="more than the 128 positions"):
        max_length_for(BertConfig(max_position_embeddings=128), tokenizer, 129)


def test_load_model_from_installed_package(minilm: str) -> None:
    config = load_config(minilm)
    tokenizer = load_tokenizer(minilm)
    model = load_model(minilm, TASK, labels("0", "1"))
    fix_padding(model, tokenizer)
    assert newly_initialised(model) == ("classifier.bias", "classifier.weight")
    assert sum(parameter.numel() for parameter in model.base_model.parameters()) == 22_713_216
    assert max_length_for(config, tokenizer) == 512
