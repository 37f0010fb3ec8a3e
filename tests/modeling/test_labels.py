"""Label names: a model names the classes of the adapter whose head answers, and the base's own otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, pipeline

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, method_of, perturb
from tests.families import FAMILIES


def named(names: list[str], family: str = "bert") -> Any:
    model = FAMILIES[family].build(classifier=True, labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def saved(folder: Path, names: list[str], settings: dict[str, Any] | None = None) -> Any:
    model = named(names)
    graft = gw.attach(model, parse_method(settings or METHODS["lora"]), name="a")
    perturb(graft.parameters(), 3)
    graft.save(folder)
    return model


def shown(model: Any) -> list[str]:
    assert model.config.label2id == {name: index for index, name in model.config.id2label.items()}
    assert model.num_labels == model.config.num_labels == len(model.config.id2label)
    return [model.config.id2label[index] for index in range(model.num_labels)]


BATCH = FAMILIES["bert"].batch()
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "word": 7}, unk_token="<unk>")),
    pad_token="<pad>",
    unk_token="<unk>",
)


@pytest.mark.parametrize("method", [name for name in METHODS if (name, "bert") not in REFUSED])
def test_load_adapter_sets_its_label_order_on_config(method: str, tmp_path: Path) -> None:
    trained = saved(tmp_path, ["p", "n", "m"], METHODS[method])
    model = named(["m", "p", "n"])
    load_adapter(model, tmp_path)
    assert shown(model) == ["p", "n", "m"]
    assert torch.equal(model(**BATCH).logits, trained(**BATCH).logits)
    gw.detach(model)
    assert shown(model) == ["m", "p", "n"]


@pytest.mark.parametrize("names", [["p"], ["p", "n"], ["p", "n", "m", "o"]])
def test_loss_and_pipeline_follow_number_of_adapter_labels(names: list[str], tmp_path: Path) -> None:
    saved(tmp_path, names)
    model = named(["x", "y", "z"])
    model(**BATCH, labels=torch.tensor([0, 1, 2]))  # which settles the base's kind of loss
    load_adapter(model, tmp_path)
    labels = torch.rand(3) if len(names) == 1 else torch.tensor([0, 1, len(names) - 1])
    output = model(**BATCH, labels=labels)
    expected = (
        torch.nn.functional.mse_loss(output.logits[:, 0], labels)
        if len(names) == 1
        else torch.nn.functional.cross_entropy(output.logits, labels)
    )
    torch.testing.assert_close(output.loss, expected)
    if len(names) > 1:
        with torch.no_grad():
            best = model(**TOKENIZER("word", return_tensors="pt")).logits.argmax().item()
        found = pipeline("text-classification", model=model, tokenizer=TOKENIZER)("word")
        assert found[0]["label"] == names[int(best)]
    gw.activate(model, None)
    assert shown(model) == ["x", "y", "z"]
    assert model(**BATCH, labels=torch.tensor([0, 1, 2])).loss.isfinite()


def test_config_labels_follow_active_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "two", ["p", "n"])
    saved(tmp_path / "four", ["a", "b", "c", "d"])
    model = named(["x", "y", "z"])
    own = gw.attach(model, method_of("lora"), name="own")
    two = load_adapter(model, tmp_path / "two", "two")
    four = load_adapter(model, tmp_path / "four", "four")
    assert shown(model) == ["a", "b", "c", "d"]
    two.activate()
    assert shown(model) == ["p", "n"]
    with gw.disabled(model):
        assert shown(model) == ["x", "y", "z"]
    assert shown(model) == ["p", "n"]
    gw.activate(model, rows=["four", "four"])
    assert shown(model) == ["a", "b", "c", "d"]
    gw.activate(model, rows=["four", "two"])
    assert shown(model) == ["x", "y", "z"]
    own.activate()
    assert shown(model) == ["x", "y", "z"]
    gw.activate(model, ["own", "two"])
    assert shown(model) == ["p", "n"]
    two.delete()
    assert shown(model) == ["x", "y", "z"]
    four.activate()
    gw.detach(model)
    assert shown(model) == ["x", "y", "z"]


def test_save_writes_labels_of_saved_adapter_not_active_one(tmp_path: Path) -> None:
    saved(tmp_path / "two", ["p", "n"])
    model = named(["x", "y", "z"])
    own = gw.attach(model, method_of("lora"), name="own")
    two = load_adapter(model, tmp_path / "two", "two")
    own.save(tmp_path / "own")
    own.activate()
    two.save(tmp_path / "again")
    for folder, labels in (("own", ["x", "y", "z"]), ("again", ["p", "n"])):
        assert json.loads((tmp_path / folder / "graftwerk.json").read_text())["labels"] == labels


def test_load_adapter_without_label_names_uses_base_or_numbered(tmp_path: Path) -> None:
    for classes, expected in ((3, ["x", "y", "z"]), (2, ["LABEL_0", "LABEL_1"])):
        model = FAMILIES["bert"].build(classifier=True, labels=classes)
        gw.attach(model, method_of("lora")).save(tmp_path / str(classes))
        (tmp_path / str(classes) / "graftwerk.json").unlink()  # a folder of PEFT's
        base = named(["x", "y", "z"])
        load_adapter(base, tmp_path / str(classes))
        assert shown(base) == expected


def test_load_adapter_more_label_names_than_classes_raises(tmp_path: Path) -> None:
    gw.attach(named(["p", "n", "m"]), method_of("lora")).save(tmp_path, labels=["p", "n"])
    model = named(["x", "y", "z"])
    with pytest.raises(AdapterError, match="names 2 labels, and its head tells 3 apart"):
        load_adapter(model, tmp_path)
    assert gw.adapters(model) == {}
    assert shown(model) == ["x", "y", "z"]


def test_load_adapter_misshapen_hidden_head_layer_raises(tmp_path: Path) -> None:
    small = FAMILIES["roberta"].build(classifier=True)
    gw.attach(small, method_of("lora")).save(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.classifier.dense.weight"
    save_file({**tensors, key: torch.zeros(5, tensors[key].shape[1])}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "graftwerk.json").unlink()
    with pytest.raises(AdapterError, match="mis-shaped"):
        load_adapter(FAMILIES["roberta"].build(classifier=True), tmp_path)
