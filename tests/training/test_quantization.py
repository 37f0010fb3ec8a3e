"""`quantization`: a base in 4 or 8 bits, from the run file to predictions, resuming, merging and other hands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
)

import graftwerk as gw
from graftwerk.config import RunConfig
from graftwerk.errors import AdapterError, ConfigError, GraftwerkError, ResourceError, RunInterrupted, UnsupportedError
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.experiments.preflight import preflight
from graftwerk.inspection.verify import verify
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.lora import LoRA
from graftwerk.methods.qera import qera_init
from graftwerk.modeling.quantize import QuantizationErrors, quantizer
from graftwerk.models import load, quantization
from graftwerk.schema import run_schema
from graftwerk.training import qera_start
from graftwerk.training.events import Event
from graftwerk.training.setup import prepare
from graftwerk.training.train import Run, train
from tests.training.conftest import _tree
from tests.training.test_processes import same_figures, together

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
TEXTS = ["a small animal that lives in water", "the act of giving"]
QERA = {"name": "lora", "init_lora_weights": "qera"}
STREAMED = {"train": "rows.jsonl", "streaming": True, "validation": None}
NF4 = {"name": "nf4", "double_quant": True, "compute_type": "auto", "skip": ["layer.1.output"]}


@pytest.fixture(scope="module", params=[NF4, "int8"], ids=["nf4", "int8"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path
) -> tuple[Run, dict[str, Any]]:
    """A finished run on a quantized base, and its run file."""
    folder = tmp_path_factory.mktemp("quantized") / "run"
    tree = {**_tree(tiny_encoder, glosses, folder), "quantization": request.param}
    return train(tree), tree


def test_run_on_a_quantized_base_names_it_everywhere_and_answers_alike(quantized: tuple[Run, dict[str, Any]]) -> None:
    run, tree = quantized
    name = "int8" if tree["quantization"] == "int8" else "nf4"
    assert RunConfig.load(run.folder / "config.yaml").quantization == RunConfig.build(tree).quantization
    assert run.manifest["quantization"]["name"] == name
    assert run.manifest["versions"]["bitsandbytes"]
    own = json.loads((run.adapter / "graftwerk.json").read_text())
    said = own["base"]["quantization"]
    kept = [f"bert.encoder.layer.1.output.{layer}" for layer in (("dense",) if name == "nf4" else ())]
    assert (said["name"], said["skip"]) == (name, [*kept, "bert.pooler.dense", "classifier"])
    assert own["base"]["fingerprint"] == run.manifest["base_fingerprint"]
    assert f"quantized by bitsandbytes: {name}" in (run.adapter / "README.md").read_text()
    assert f"base in {name}" not in (run.adapter / "adapter_config.json").read_text()
    checked = verify(run)
    assert checked["unchanged"] is True
    assert any("codes and their scales are compared" in note for note in checked["notes"])
    scale = "weight.SCB" if name == "int8" else "weight.absmax"
    assert f"bert.encoder.layer.0.output.dense.{scale}" in run.manifest["base_tensors"]["before"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        measured = gw.evaluate(run)
        answers = [gw.predict(place, TEXTS)["predictions"] for place in (run, run.adapter)]
    assert measured["metrics"]["accuracy"] == run.manifest["metrics"]["test"]["accuracy"]
    assert answers[0] == answers[1]


def test_resumed_run_on_a_quantized_base_is_the_same_to_the_last_bit(
    quantized: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    run, tree = quantized

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 9):
            os.kill(os.getpid(), signal.SIGTERM)

    again = {**tree, "output_dir": str(tmp_path / "run")}
    with pytest.raises(RunInterrupted):
        train(again, listener=stop)
    with pytest.raises(GraftwerkError, match="this is not the run that was interrupted: quantization"):
        train({**again, "quantization": None}, resume=True)
    resumed = train(again, resume=True)
    files = [one.adapter / "adapter_model.safetensors" for one in (run, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapter_of_a_quantized_base_says_what_differs_on_others(
    quantized: tuple[Run, dict[str, Any]], tiny_encoder: Path
) -> None:
    run, tree = quantized
    eight = tree["quantization"] == "int8"
    skipped = ["classifier", "pooler.dense", *([] if eight else ["layer.1.output.dense"])]
    config = BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skipped,
    )
    kwargs = {"num_labels": 3, "dtype": torch.float32}
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, quantization_config=config, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gw.load(theirs, run.adapter, force=False)  # quantized by transformers alone, to the same codes
    full = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, **kwargs)
    with pytest.warns(
        UserWarning, match="trained on a base in (nf4 with double quantization|int8), and this one is in"
    ):
        gw.load(full, run.adapter)
    other = AutoModelForSequenceClassification.from_config(full.config)
    with pytest.raises(AdapterError, match=r"trained on another base.*, and this one is in full precision"):
        gw.load(other, run.adapter)


def test_merge_and_export_of_a_quantized_base_answer_as_the_adapter(
    quantized: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    run, tree = quantized
    name = "int8" if tree["quantization"] == "int8" else "nf4"
    merged = gw.merge(run, tmp_path / "merged")
    assert merged["parity"]["max_abs_difference"] < 1e-5
    assert f"the full weights that the base's {name} stands for" in merged["notes"][-1]
    assert "quantization_config" not in json.loads((merged["out"] / "config.json").read_text())
    exported = gw.export(run, tmp_path / "peft", to="peft")
    assert exported["parity"]["max_abs_difference"] < 1e-4
    assert any(f"on a base in {name}" in note for note in exported["notes"])


def test_qera_starts_nearer_to_the_full_base_and_is_stored_as_lora(run_file: Any, tmp_path: Path) -> None:
    """With next to no learning rate the stored adapter is the start."""
    bases = {}
    for start in (True, "qera"):
        method = {"name": "lora", "r": 8, "target_modules": "all-linear", "init_lora_weights": start}
        tree = run_file(tmp_path / str(start), method=method, max_steps=1, learning_rate=1e-12)
        run = train({**tree, "quantization": "nf4"})
        bases[start] = load_adapter_for(run.folder).model
    stored = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["init_lora_weights"]) == ("LORA", True)
    assert gw.adapters(bases["qera"])["default"].method.init_lora_weights == "qera"
    classifier = AutoModelForSequenceClassification.from_pretrained(tree["model"], num_labels=3)
    with pytest.warns(
        UserWarning, match="in full precision: it corrects quantization errors that this base does not have"
    ):
        gw.load(classifier, run.adapter)
    full = AutoModel.from_pretrained(tree["model"])
    batch = {"input_ids": torch.arange(5, 65).reshape(4, 15)}
    with torch.no_grad():
        wanted = full(**batch).last_hidden_state
        apart = {start: (base.bert(**batch).last_hidden_state - wanted).norm() for start, base in bases.items()}
    assert apart["qera"] < 0.8 * apart[True]


def test_qera_measures_the_inputs_of_the_training_rows(
    run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer reads the embeddings, whose mean square over all tokens of the rows, unpadded, is compared."""
    measured: list[torch.Tensor] = []

    def record(error: Any, mean_square: Any, *rest: Any) -> Any:
        measured.append(mean_square)
        return qera_init(error, mean_square, *rest)

    monkeypatch.setattr(qera_start, "qera_init", record)
    tree = run_file(tmp_path / "run", method={**QERA, "target_modules": ["query"]}, max_steps=1)
    run = train(tree := {**tree, "quantization": "nf4"})
    loaded, prepared = load_adapter_for(run.folder), prepare(RunConfig.build(tree), lambda event: None)
    with torch.no_grad():
        read = [
            loaded.model.bert.embeddings(torch.tensor([row.inputs["input_ids"]]))[0]
            for row in prepared.examples["train"]
        ]
    torch.testing.assert_close(measured[0], (torch.cat(read) ** 2).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_qera_takes_the_errors_of_transposed_layers_as_they_are_applied(tmp_path: Path) -> None:
    """GPT-2 stores weights as (in, out); its adapter starts nearer to the full layers than their codes are."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path)
    errors = QuantizationErrors()
    made = quantizer("nf4", double_quant=True, compute=torch.float32, errors=errors)
    coded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=made)
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(errors) == 4
    for path in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"):
        wanted = full.get_submodule(path).weight.T - base_weight(coded.get_submodule(path))  # (out, in)
        error = errors.take(path)
        assert (error - wanted).norm() < 0.12 * wanted.norm()  # in 4 bits itself
        assert path not in errors
    errors.clear()
    assert not len(errors)


def test_quantization_errors_of_any_width_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' CPU kernel misreads the scales of rows whose length is no multiple of 64."""
    torch.manual_seed(0)
    for width in (16, 48, 80, 64):
        errors, weight = QuantizationErrors(), torch.randn(24, width)
        decode, nothing = bitsandbytes.functional.dequantize_4bit, torch.zeros(24, width)
        codes = SimpleNamespace(data=None, quant_state=nothing)
        monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda data, state: state)
        errors.keep("layer", weight, codes)
        monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", decode)
        assert (errors.take("layer") - weight).norm() < 0.12 * weight.norm(), width


def test_qera_without_a_quantized_layer_raises(run_file: Any, tmp_path: Path) -> None:
    method = {**QERA, "target_modules": ["query"]}
    tree = {**run_file(method=method), "quantization": {"name": "nf4", "skip": ["query"]}}
    with pytest.raises(ConfigError, match="none of the adapted layers is quantized") as caught:
        train(tree)
    assert caught.value.hint
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    events: list[Event] = []
    method = {**QERA, "target_modules": ["query", "key"]}
    train(
        {**run_file(tmp_path / "two", method=method, max_steps=1), "quantization": tree["quantization"]},
        listener=events.append,
    )
    said = [event.values["text"] for event in events if event.kind == "warning"]
    assert any("2 of 4 adapted layers are not quantized and use LoRA's default initialization" in text for text in said)


def test_warm_start_takes_the_place_of_qera(run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {**run_file(tmp_path / "one", method=QERA, max_steps=1), "quantization": "nf4"}
    first = train(tree)
    monkeypatch.setattr(qera_start, "start_from_errors", None)
    tree["output_dir"], tree["training"] = str(tmp_path / "two"), {**tree["training"], "warm_start": str(first.folder)}
    assert train(tree).manifest["status"] == "finished"


def test_resumed_run_from_qera_with_retained_rows_measures_them_at_the_start(run_file: Any, tmp_path: Path) -> None:
    """What is retained, and what consolidation holds on to, is the model after the start, in a resumed run as well."""

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 5):
            os.kill(os.getpid(), signal.SIGTERM)

    earlier = train({**run_file(tmp_path / "earlier", max_steps=2), "quantization": "nf4"})
    trees = []
    for name in ("one", "two"):
        tree = {**run_file(tmp_path / name, method=QERA, retain={"consolidation": 100.0}), "quantization": "nf4"}
        tree["evaluation"] |= {"retained": {"earlier": {"run": str(earlier.folder)}}}
        trees.append(tree)
    with pytest.raises(RunInterrupted):
        train(trees[0], listener=stop)
    runs = [train(trees[0], resume=True), train(trees[1])]
    files = [run.adapter / "adapter_model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resumed_run_from_qera_is_the_same_to_the_last_bit(run_file: Any, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 5):
            os.kill(os.getpid(), signal.SIGTERM)

    trees = [{**run_file(tmp_path / name, method=QERA), "quantization": "nf4"} for name in ("one", "two")]
    with pytest.raises(RunInterrupted):
        train(trees[0], listener=stop)
    runs = [train(trees[0], resume=True), train(trees[1])]
    files = [run.adapter / "adapter_model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_biases_of_a_4_bit_base_keep_their_precision_in_bfloat16(run_file: Any, tmp_path: Path) -> None:
    """bitsandbytes rounds them in place, in evaluation into tensors that nothing outside of inference can use."""
    biased = AutoModel.from_pretrained(run_file()["model"])
    torch.manual_seed(0)
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    shutil.copytree(run_file()["model"], tmp_path / "biased")
    biased.save_pretrained(tmp_path / "biased")
    tree = run_file(tmp_path / "run", max_steps=2, compute_type="bfloat16")
    run = train({**tree, "model": str(tmp_path / "biased"), "quantization": "nf4"})
    assert verify(run)["unchanged"] is True
    gw.merge(run, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted = biased.get_parameter("encoder.layer.0.intermediate.dense.bias")
    assert torch.equal(merged.get_parameter("bert.encoder.layer.0.intermediate.dense.bias"), wanted)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": QERA}, ConfigError, "corrects the errors of 4-bit weights"),
        ({"method": QERA, "quantization": "int8"}, ConfigError, "corrects the errors of 4-bit weights"),
        ({"method": QERA, "quantization": "nf4", "data": STREAMED}, ConfigError, "needs training rows before"),
        ({"quantization": "nf4", "method": "full"}, ConfigError, "own weights, and `quantization: nf4`"),
        ({"quantization": "fp4"}, ConfigError, "quantization.name"),
        ({"quantization": {"name": "int8", "double_quant": True}}, ConfigError, "`double_quant` is for nf4"),
        ({"quantization": {"name": "int8", "compute_type": "bfloat16"}}, ConfigError, "`compute_type` is for nf4"),
        ({"quantization": {"name": "nf4", "compute_type": "float16"}}, UnsupportedError, "float16 needs"),
        ({"quantization": {"name": "nf4", "skip": ["a(b+)+"]}}, ConfigError, "quantization.skip"),
        ({"quantization": {"name": "nf4", "skp": ["lm_head"]}}, ConfigError, "did you mean `skip`"),
    ],
)  # fmt: skip
def test_invalid_quantization_raises_before_the_model_is_loaded(
    changes: dict[str, Any],
    error: type[GraftwerkError],
    words: str,
    run_file: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for use in (train, lambda tree: preflight(RunConfig.build(tree))):
        with pytest.raises(error, match=words) as caught:
            use({**run_file(), **changes})
        assert caught.value.hint


def test_quantization_without_its_package_or_with_unknown_names_raises(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="`layr` matches no linear layer of Bert") as caught:
        train({**run_file(), "quantization": {"name": "nf4", "skip": ["layr"]}})
    assert "query" in str(caught.value.hint)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(quantization, "version", missing)
    with pytest.raises(ResourceError, match="needs the package bitsandbytes") as caught:
        train({**run_file(), "quantization": "nf4"})
    assert "graftwerk[quantized]" in str(caught.value.hint)


def test_attach_refuses_a_start_that_needs_rows(tiny_encoder: Path) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    with pytest.raises(ConfigError, match="needs the full weights and training rows") as caught:
        gw.attach(bert, LoRA(init_lora_weights="qera"))
    assert "quantization: nf4" in str(caught.value.hint)
    assert not gw.adapters(bert)


def test_schema_takes_names_and_settings_of_a_quantization() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(run_schema())
    tree = {"model": "m", "data": {"train": "rows.csv"}, "method": "lora"}
    assert [validator.is_valid({**tree, "quantization": value}) for value in ("nf4", NF4, None, "int8", "fp4", {})] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("nf4", "lora"), ("int8", "lora"), ("nf4", QERA)], ids=str)
def test_launched_processes_on_a_quantized_base_train_as_one(
    name: str, method: Any, run_file: Any, tmp_path: Path, still: Path
) -> None:
    shared = run_file(tmp_path / "two", per_device_train_batch_size=4, per_device_eval_batch_size=4)
    alone = run_file(tmp_path / "one", per_device_train_batch_size=8, per_device_eval_batch_size=4)
    for tree in (shared, alone):
        tree |= {"model": str(still), "quantization": name, "method": method}
    assert [child.wait() for child in together(lambda rank: train(shared))] == [0, 0]
    train(alone)
    same_figures(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_compare_on_a_quantized_base_ranks_methods(run_file: Any, tmp_path: Path) -> None:
    tree = {**run_file(tmp_path / "compared"), "quantization": "nf4"}
    found = gw.compare(tree, methods=["lora", "prefix"], seeds=[0])
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "compared").glob("**/manifest.json")]
    assert {manifest["method"]["name"] for manifest in manifests} == {"lora", "prefix"}
    assert {manifest["quantization"]["name"] for manifest in manifests} == {"nf4"}
    assert found
