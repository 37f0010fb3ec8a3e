"""Weights that a checkpoint lacks are drawn at random by whoever loads it: stored with the adapter, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.drawn import drawn_modules
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, method_of, perturb
from tests.families import FAMILIES, SMALL

BATCH = FAMILIES["bert"].batch()


@pytest.fixture(scope="module")
def poolerless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a masked language model: no pooler, no classifier."""
    folder = tmp_path_factory.mktemp("base")
    FAMILIES["bert"].build().save_pretrained(folder)
    return folder


def loaded(folder: Path, seed: int, kind: str = "SequenceClassification", **options: Any) -> Any:
    torch.manual_seed(seed)
    cls = getattr(tf, f"AutoModelFor{kind}" if kind else "AutoModel")
    return cls.from_pretrained(folder, **options).eval()


def classifier(folder: Path, seed: int) -> Any:
    return loaded(folder, seed, num_labels=3, initializer_range=0.3)


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**BATCH).logits
    return logits


@pytest.mark.parametrize("method", METHODS)
def test_load_adapter_base_without_pooler_reproduces_outputs(method: str, poolerless: Path, tmp_path: Path) -> None:
    model = classifier(poolerless, 1)
    graft = gw.attach(model, method_of(method))
    perturb(graft.parameters(), 5)
    graft.save(tmp_path)
    other = classifier(poolerless, 2)
    assert not torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(answers(other), answers(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if config["peft_type"].startswith("GRAFTWERK_"):
        return
    peft = pytest.importorskip("peft")
    found = peft.PeftModel.from_pretrained(classifier(poolerless, 3), tmp_path).eval()
    torch.testing.assert_close(answers(found), answers(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("modules_to_save", ["auto", ["classifier"], []])
def test_attach_saves_newly_initialized_modules_whatever_modules_to_save(
    modules_to_save: Any, poolerless: Path
) -> None:
    method = parse_method({"name": "lora", "r": 2, "modules_to_save": modules_to_save})
    graft = gw.attach(classifier(poolerless, 1), method)
    assert sorted(graft.heads) == ["bert.pooler", "classifier"]
    assert not any("pooler" in path for path in graft.hosts)


def _llama() -> Any:
    return tf.LlamaModel(tf.LlamaConfig(**SMALL))


def _distilbert() -> Any:
    return FAMILIES["distilbert"].build().distilbert


def _marian() -> Any:
    return FAMILIES["marian"].build()


@pytest.mark.parametrize(
    ("build", "kind", "expected"),
    [
        (_distilbert, "SequenceClassification", ("classifier", "pre_classifier")),
        (_distilbert, "MaskedLM", ("vocab_transform",)),
        (_llama, "SequenceClassification", ("score",)),
        (_llama, "CausalLM", ()),  # an output embedding is too large to be stored; its digest is compared
        (_marian, "Seq2SeqLM", ()),  # tables of positions are computed
        (FAMILIES["bert"].build, "", ("pooler",)),
        (FAMILIES["bert"].build, "TokenClassification", ("classifier",)),
        (FAMILIES["bert"].build, "MaskedLM", ()),
        (lambda: FAMILIES["bert"].build().bert, "MaskedLM", ("cls.predictions.transform",)),
    ],
)
def test_drawn_modules_names_newly_initialized_modules(
    build: Any, kind: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    assert tuple(sorted(drawn_modules(loaded(tmp_path, 0, kind)))) == expected


def test_drawn_modules_unknown_checkpoint_is_empty(poolerless: Path) -> None:
    assert drawn_modules(FAMILIES["bert"].build(classifier=True)) == ()
    assert drawn_modules(copy.deepcopy(classifier(poolerless, 1))) == ()
    assert drawn_modules(classifier(poolerless, 1).half().float()) == ("bert.pooler", "classifier")


def test_load_adapter_base_with_other_pooler_raises(poolerless: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(classifier(poolerless, 1))  # nobody knows any more that its pooler was drawn
    gw.attach(model, method_of("lora")).save(tmp_path)
    other = copy.deepcopy(classifier(poolerless, 2))
    with pytest.raises(AdapterError, match=r"`bert.pooler.dense.weight` of this base has other values"):
        load_adapter(other, tmp_path)
    assert gw.adapters(other) == {}
    load_adapter(other, tmp_path, force=True)
    load_adapter(model, tmp_path, "again")


def test_load_adapter_reinitialized_output_embedding_raises(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", 1, "CausalLM")
    gw.attach(model, method_of("lora")).save(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"`lm_head.weight` of this base has other values"):
        load_adapter(loaded(tmp_path / "base", 2, "CausalLM"), tmp_path / "a")
    load_adapter(model, tmp_path / "a", "again")


def test_load_adapter_peft_without_newly_initialized_pooler_raises(poolerless: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(classifier(poolerless, 1), settings).save_pretrained(tmp_path)
    base = classifier(poolerless, 2)
    with pytest.raises(AdapterError, match=r"`bert.pooler` of this base was drawn at random"):
        load_adapter(base, tmp_path)
    load_adapter(base, tmp_path, force=True)


def test_load_adapter_without_head_warns_of_newly_initialized_head(poolerless: Path, tmp_path: Path) -> None:
    method = parse_method({"name": "lora", "r": 2, "target_modules": "attention", "modules_to_save": []})
    gw.attach(FAMILIES["bert"].build(), method).save(tmp_path)
    with pytest.warns(UserWarning, match="`classifier`.*drawn at random"):
        load_adapter(classifier(poolerless, 2), tmp_path)


def test_attach_saves_newly_initialized_position_embeddings(tmp_path: Path) -> None:
    """Tables of positions of another length, which transformers draws anew when told to ignore the sizes."""
    FAMILIES["bert"].build(classifier=True).save_pretrained(tmp_path / "base")
    options = {"max_position_embeddings": 32, "ignore_mismatched_sizes": True}
    model, other = (loaded(tmp_path / "base", seed, **options) for seed in (1, 2))
    graft = gw.attach(model, method_of("lora"))
    assert "bert.embeddings.position_embeddings" in graft.heads
    graft.save(tmp_path / "a")
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(answers(other), answers(model))
