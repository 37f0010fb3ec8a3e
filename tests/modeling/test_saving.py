"""`save_pretrained` of a model with adapters: plain transformers loads what the folder promises."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import graftwerk.modeling.attach as gw
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, method_of, model_and_batch, perturb
from tests.families import FAMILIES


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def plain(model: Any, folder: Path) -> Any:
    """What plain transformers makes of a folder, in the class of this model without its adapters."""
    config = json.loads((folder / "config.json").read_text())
    own = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    own = getattr(__import__("transformers"), own.__name__)
    assert config["architectures"] == [own.__name__]
    assert "graft" not in json.dumps(config)
    assert not any("graft" in key for key in load_file(folder / "model.safetensors"))
    return own.from_pretrained(folder).eval()


MERGED = [
    (method, family)
    for method in ("lora", "dora", "pissa", "ia3", "bitfit")
    for family in ("bert", "roberta", "distilbert", "llama", "gpt2")
    if (method, family) not in REFUSED
]


@pytest.mark.parametrize(("method", "family"), MERGED)
def test_save_pretrained_merged_model_has_adapter_head(method: str, family: str, tmp_path: Path) -> None:
    model, batch = model_and_batch(method, family)
    graft = gw.attach(model, method_of(method), name="a")
    perturb(graft.parameters(), 5)
    graft.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(plain(model, tmp_path), batch), answers(model, batch))
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize("explicit", [False, True])
def test_save_pretrained_merged_model_has_adapter_labels(explicit: bool, tmp_path: Path) -> None:
    trained = FAMILIES["bert"].build(classifier=True, labels=2)
    trained.config.id2label, trained.config.label2id = {0: "n", 1: "p"}, {"n": 0, "p": 1}
    perturb(gw.attach(trained, method_of("lora"), name="a").parameters(), 5)
    gw.adapters(trained)["a"].save(tmp_path / "a")
    model, batch = model_and_batch("lora", "bert")
    load_adapter(model, tmp_path / "a").merge()
    model.save_pretrained(tmp_path / "m", state_dict=model.state_dict() if explicit else None)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert found.config.id2label == {0: "n", 1: "p"}
    torch.testing.assert_close(answers(found, batch), answers(trained, batch))


def test_save_pretrained_full_adapter_saves_active_weights(tmp_path: Path) -> None:
    model, batch = model_and_batch("full", "bert")
    bare = answers(model, batch)
    perturb(gw.attach(model, method_of("full"), name="a").parameters(), 5, scale=0.1)
    model.save_pretrained(tmp_path / "trained")
    torch.testing.assert_close(answers(plain(model, tmp_path / "trained"), batch), answers(model, batch))
    gw.activate(model, None)
    with pytest.warns(UserWarning, match="`a`"):
        model.save_pretrained(tmp_path / "bare")
    torch.testing.assert_close(answers(plain(model, tmp_path / "bare"), batch), bare)


def test_save_pretrained_active_probe_has_its_head(tmp_path: Path) -> None:
    model, batch = model_and_batch("probe", "bert")
    perturb(gw.attach(model, method_of("probe"), name="a").parameters(), 5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(plain(model, tmp_path), batch), answers(model, batch))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "probe")])
def test_save_pretrained_saves_base_and_each_adapter(method: str, tmp_path: Path) -> None:
    family = "bert" if (method, "llama") in REFUSED else "llama"
    model, batch = model_and_batch(method, family)
    bare = answers(model, batch)
    for name in ("a", "b"):
        perturb(gw.attach(model, method_of(method), name=name).parameters(), 5)
    with pytest.warns(UserWarning, match=r"without `a`, `b`"):
        model.save_pretrained(tmp_path)
    base = plain(model, tmp_path)
    assert torch.equal(answers(base, batch), bare)
    for (
        parameter
    ) in base.parameters():  # mapped from the file, at any address: DoRA's sums over rows may round otherwise
        parameter.data = parameter.data.clone()
    load_adapter(base, tmp_path / "adapters" / "a")
    gw.activate(model, "a")
    assert torch.equal(answers(base, batch), answers(model, batch))
    assert gw.detach(model).__class__ is type(FAMILIES[family].build(classifier=family == "bert"))


def test_save_pretrained_merged_beside_other_adapter_saves_both(tmp_path: Path) -> None:
    model, batch = model_and_batch("lora", "bert")
    for name in ("a", "b"):
        perturb(gw.attach(model, method_of("lora"), name=name).parameters(), ord(name))
    gw.activate(model, "a")
    gw.adapters(model)["a"].merge()
    with pytest.warns(UserWarning, match="without `b`"):
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(plain(model, tmp_path), batch), answers(model, batch))
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["b"]


def test_save_pretrained_merged_tied_embeddings_equal_outputs(tmp_path: Path) -> None:
    model, batch = model_and_batch("lora", "gpt2")
    settings = {"name": "lora", "r": 2, "modules_to_save": ["transformer.wte"]}
    graft = gw.attach(model, parse_method(settings))
    perturb(graft.parameters(), 5)
    graft.merge()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(plain(model, tmp_path), batch), answers(model, batch))


def test_hf_trainer_checkpoint_resumes_adapter(tmp_path: Path) -> None:
    ends = {}
    for resumed in (False, True):
        model, batch = model_and_batch("lora", "bert")
        torch.manual_seed(0)
        graft = gw.attach(model, method_of("lora"), name="a")
        rows = [{**{key: value[index] for key, value in batch.items()}, "labels": index % 3} for index in range(3)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=4,
            save_steps=2,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        ends[resumed] = {key: value.clone() for key, value in graft.state_dict().items()}
    for key, value in ends[False].items():
        torch.testing.assert_close(ends[True][key], value, msg=lambda text, at=key: f"{at}: {text}")
    base, batch = model_and_batch("lora", "bert")
    load_adapter(base, tmp_path / "checkpoint-4" / "adapters" / "a")
    torch.testing.assert_close(answers(base, batch), answers(model.eval(), batch))
