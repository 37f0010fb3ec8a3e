"""Trained rows of embeddings (`trainable_token_indices`) in PEFT's folders, in both directions: equal outputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, ConfigError, UnsupportedError
from graftwerk.inspection.adapter import describe_adapter
from graftwerk.methods.lora import LoRA
from graftwerk.methods.trainable_tokens import ROWS
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.families import ALL, GATED
from tests.serialization.peft_models import load_in_peft, save_peft_adapter

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROW = [40, 3, 17]
"""Not in order: the rows are stored as they are named."""
TARGET = {"bert": "query", "gpt2": "c_attn", "t5": "q", "electra": "query", "distilbert": "q_lin", "modernbert": "Wqkv"}
FAMILIES = ["bert", "electra", "distilbert", "modernbert", "gpt2", "opt", "llama", "gemma3", "t5", "bart", "marian"]


def model_of(family: str, *, tied: bool | None = None, classifier: bool = False) -> Any:
    if tied is not None:
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, tie_word_embeddings=tied)).eval()
    model = ALL[family].build(classifier=classifier)
    outputs = model.get_output_embeddings()
    if outputs is not None and outputs.bias is not None:
        torch.nn.init.zeros_(outputs.bias)  # which PEFT leaves out
    return model


def run(model: Any, family: str, row: list[int] | None = None) -> Tensor:
    batch = ALL[family].batch()
    batch["input_ids"][0, : len(row or ROW)] = torch.tensor(row or ROW)
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def peft_config(family: str, **settings: Any) -> peft.LoraConfig:
    settings = {"r": 2, "target_modules": [TARGET.get(family, "q_proj")], "trainable_token_indices": ROW, **settings}
    return peft.LoraConfig(fan_in_fan_out=family == "gpt2", **settings)


def made_by_peft(model: Any, family: str, folder: Path, **settings: Any) -> Any:
    return save_peft_adapter(model, peft_config(family, **settings), folder)


def moved(graft: gw.Adapter) -> gw.Adapter:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return graft


CASES = [
    *((family, {}) for family in FAMILIES),
    ("bert", {"classifier": True}),
    ("llama", {"tied": True}),
    ("llama", {"tied": False}),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_load_adapter_peft_token_rows_roundtrip(family: str, kind: dict[str, Any], tmp_path: Path) -> None:
    saved = ["classifier"] if kind.get("classifier") else None
    theirs = made_by_peft(model_of(family, **kind), family, tmp_path / "theirs", modules_to_save=saved)
    expected = run(theirs, family)
    model = model_of(family, **kind)
    bare = run(model, family)
    graft = load_adapter(model, tmp_path / "theirs")
    assert graft.method.trainable_token_indices == tuple(ROW)  # type: ignore[attr-defined]
    torch.testing.assert_close(run(model, family), expected, **CLOSE)
    with gw.disabled(model):
        assert torch.equal(run(model, family), bare)
    save_adapter(graft, tmp_path / "ours")
    again = model_of(family, **kind)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(run(again, family), run(model, family))
    back = load_in_peft(model_of(family, **kind), tmp_path / "ours")
    torch.testing.assert_close(run(back, family), expected, **CLOSE)


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_save_adapter_token_rows_give_equal_outputs_in_peft(
    family: str, kind: dict[str, Any], init: Any, tmp_path: Path
) -> None:
    model = model_of(family, **kind)
    torch.manual_seed(4)
    settings = {"r": 2, "target_modules": [TARGET.get(family, "q_proj")], "init_lora_weights": init}
    graft = moved(gw.attach(model, LoRA(**settings, trainable_token_indices=ROW)))
    save_adapter(graft, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert [tuple(tensor.shape) for key, tensor in stored.items() if key.endswith(ROWS)] == [
        (3, model.get_input_embeddings().embedding_dim)
    ]
    torch.testing.assert_close(
        run(load_in_peft(model_of(family, **kind), tmp_path / "a"), family), run(model, family), **CLOSE
    )
    again = model_of(family, **kind)
    load_adapter(again, tmp_path / "a", trainable=True)
    torch.testing.assert_close(run(again, family), run(model, family))


def test_token_rows_of_two_tables_roundtrip_with_peft(tmp_path: Path) -> None:
    wanted = {"embed_tokens": [5, 40], "lm_head": [3]}
    theirs = made_by_peft(model_of("llama", tied=False), "llama", tmp_path / "t", trainable_token_indices=wanted)
    model = model_of("llama", tied=False)
    graft = load_adapter(model, tmp_path / "t")
    torch.testing.assert_close(run(model, "llama"), run(theirs, "llama"), **CLOSE)
    assert graft.method.trainable_token_indices == {"model.embed_tokens": (5, 40), "lm_head": (3,)}  # type: ignore[attr-defined]
    save_adapter(graft, tmp_path / "o")
    back = load_in_peft(model_of("llama", tied=False), tmp_path / "o")
    torch.testing.assert_close(run(back, "llama"), run(theirs, "llama"), **CLOSE)


def test_save_adapter_tied_by_weight_alone_writes_both_tables(tmp_path: Path) -> None:
    """PEFT asks the configuration, and not the weights, whether the output is tied."""

    def model() -> Any:
        made = model_of("llama", tied=False)
        made.lm_head.weight = made.model.embed_tokens.weight
        return made

    ours = model()
    graft = moved(gw.attach(ours, LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=ROW)))
    save_adapter(graft, tmp_path)
    torch.testing.assert_close(run(load_in_peft(model(), tmp_path), "llama"), run(ours, "llama"), **CLOSE)
    again = model()
    load_adapter(again, tmp_path)
    assert torch.equal(run(again, "llama"), run(ours, "llama"))


# -- a resized vocabulary ----------------------------------------------------------------------------------------------


def resized(folder: Path, seed: int) -> Any:
    """The base with six new tokens, whose rows are drawn at random."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(70)
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        torch.nn.init.normal_(table.data[64:])
    return model


NEW = [64, 65, 66, 67, 68, 69]


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama untied"])
def test_load_adapter_trained_new_tokens_reproduce_outputs(family: str, tmp_path: Path) -> None:
    family, _, untied = family.partition(" ")
    (model_of(family) if family == "gpt2" else model_of(family, tied=not untied)).save_pretrained(tmp_path / "base")
    rows: Any = {"embed_tokens": NEW, "lm_head": NEW} if untied else NEW
    model = resized(tmp_path / "base", 1)
    target = [TARGET.get(family, "q_proj")]
    graft = moved(gw.attach(model, LoRA(r=2, target_modules=target, trainable_token_indices=rows)))
    save_adapter(graft, tmp_path / "a", metadata={"base_fingerprint": "of the base, where a run has computed it"})
    expected = run(model, family, NEW)
    assert max(tensor.numel() for tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").values()) < 70 * 16
    other = resized(tmp_path / "base", 2)
    assert not torch.allclose(run(other, family, NEW), expected, atol=1e-3)
    load_adapter(other, tmp_path / "a")  # the rows that it replaces are no part of the base's fingerprint
    torch.testing.assert_close(run(other, family, NEW), expected, **CLOSE)
    theirs = load_in_peft(resized(tmp_path / "base", 3), tmp_path / "a")
    torch.testing.assert_close(run(theirs, family, NEW), expected, **CLOSE)


def test_load_adapter_untrained_new_token_raises_other_base(tmp_path: Path) -> None:
    model_of("llama", tied=True).save_pretrained(tmp_path / "base")
    graft = gw.attach(resized(tmp_path / "base", 1), LoRA(r=2, trainable_token_indices=NEW[1:]))
    save_adapter(graft, tmp_path / "a")
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(resized(tmp_path / "base", 2), tmp_path / "a")
    load_adapter(resized(tmp_path / "base", 1), tmp_path / "a")


def test_load_adapter_untrained_untied_head_raises_other_base(tmp_path: Path) -> None:
    model_of("llama", tied=False).save_pretrained(tmp_path / "base")
    graft = gw.attach(resized(tmp_path / "base", 1), LoRA(r=2, trainable_token_indices=NEW))
    save_adapter(graft, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"`lm_head\.weight` of this base has other values"):
        load_adapter(resized(tmp_path / "base", 2), tmp_path / "a")


def test_load_adapter_vocabulary_not_resized_raises_with_hint(tmp_path: Path) -> None:
    model_of("llama", tied=True).save_pretrained(tmp_path / "base")
    save_adapter(gw.attach(resized(tmp_path / "base", 1), LoRA(r=2, trainable_token_indices=NEW)), tmp_path / "a")
    model = model_of("llama", tied=True)
    with pytest.raises(ConfigError, match="row 69 is out of range") as caught:
        load_adapter(model, tmp_path / "a")
    assert "resize_token_embeddings" in (caught.value.hint or "")
    assert not gw.adapters(model)


@pytest.mark.parametrize("rows", [NEW, NEW[1:]])
@pytest.mark.parametrize("tied", [True, False])
def test_load_adapter_peft_resized_table_gives_equal_outputs(tied: bool, rows: list[int], tmp_path: Path) -> None:
    """PEFT stores the whole table then; where its other rows are not the model's, it becomes a saved module."""
    model_of("llama", tied=tied).save_pretrained(tmp_path / "base")
    made_by_peft(resized(tmp_path / "base", 1), "llama", tmp_path / "t", trainable_token_indices=rows)
    assert any("base_layer" in key for key in load_file(tmp_path / "t" / "adapter_model.safetensors"))
    expected = run(load_in_peft(resized(tmp_path / "base", 2), tmp_path / "t"), "llama", NEW)
    model = resized(tmp_path / "base", 2)
    graft = load_adapter(model, tmp_path / "t")
    torch.testing.assert_close(run(model, "llama", NEW), expected, **CLOSE)
    whole = {path for path in graft.heads if path != "lm_head" or tied}
    assert whole == (set() if rows == NEW else {"model.embed_tokens", "lm_head"} if tied else {"model.embed_tokens"})
    with pytest.raises((AdapterError, ConfigError)) as caught:
        load_adapter(model_of("llama", tied=tied), tmp_path / "t")
    assert "resize_token_embeddings(70)" in (caught.value.hint or "")


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    file = folder / "adapter_model.safetensors"
    stored = {**load_file(file), **tensors}
    save_file({key: tensor for key, tensor in stored.items() if tensor is not None}, file, {"format": "pt"})
    return folder


KEY = f"base_model.model.model.embed_tokens.{ROWS}"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({KEY: None}, "missing model.embed_tokens"),
        ({KEY: torch.zeros(2, 16)}, r"shape \(2, 16\) for 3 rows of 16"),
        ({KEY: torch.zeros(3, 15)}, r"shape \(3, 15\) for 3 rows of 16"),
        ({f"base_model.model.lm_head.{ROWS}": torch.zeros(3, 16)}, "not known here lm_head"),
        ({KEY.replace("embed_tokens", "norm"): torch.zeros(3, 16)}, "not known here model.norm"),
    ],
)
def test_load_adapter_mismatched_token_rows_raise(tensors: dict[str, Any], words: str, tmp_path: Path) -> None:
    made_by_peft(model_of("llama"), "llama", tmp_path)
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=words):
        load_adapter(model, changed(tmp_path, **tensors))
    assert not gw.adapters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_load_adapter_tied_tables_with_different_rows_raise(tmp_path: Path) -> None:
    made_by_peft(model_of("llama", tied=True), "llama", tmp_path)
    changed(tmp_path, **{f"base_model.model.lm_head.{ROWS}": torch.zeros(3, 16)})
    with pytest.raises(UnsupportedError, match="their trained rows differ"):
        load_adapter(model_of("llama", tied=True), tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [3, 3, 17],
        [40, 3, 64],
        {"nowhere": [1]},
        {"": [1]},
        {"embed_tokens": []},
        {"embed_tokens": 3},
        ["3"],
        [-1],
        [2.0],
        [2**40],
        True,
        "3",
    ],
)
def test_load_adapter_invalid_trainable_token_indices_raise(rows: Any, tmp_path: Path) -> None:
    made_by_peft(model_of("llama"), "llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": rows}))
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        load_adapter(model_of("llama"), tmp_path)


def test_load_adapter_bias_ignored_by_peft_warns(tmp_path: Path) -> None:
    made_by_peft(model_of("bert"), "bert", tmp_path)
    with pytest.warns(UserWarning, match=r"PEFT leaves the bias of `cls\.predictions\.decoder` out"):
        load_adapter(ALL["bert"].build(), tmp_path)


def test_describe_adapter_lists_token_rows(tmp_path: Path) -> None:
    model = model_of("llama")
    save_adapter(gw.attach(model, LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=ROW)), tmp_path)
    (one,) = [one for one in describe_adapter(tmp_path)["learnt"] if one["what"] == "rows of tokens"]
    assert (one["module"], one["parameters"]) == ("model.embed_tokens", 3 * 16)
