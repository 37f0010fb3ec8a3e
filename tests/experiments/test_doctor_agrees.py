"""What `train` refuses before its first step, `doctor` finds, in the same words: both run over the same bad inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from graftwerk.config import RunConfig
from graftwerk.errors import GraftwerkError
from graftwerk.experiments.preflight import preflight
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.training.data_checks import raise_on_severe
from graftwerk.training.train import train

WORDS = "act ball city dog egg fish gold hill iron jam king lamp moon nest oak pond queen rain salt tree".split()  # noqa: SIM905


def text(at: int) -> str:
    return " ".join(WORDS[(at * 7 + step * (at % 9 + 1)) % 20] for step in range(8)) + f" {at}"


def rows(count: int = 20, label: Callable[[int], Any] = lambda at: "ab"[at % 2]) -> list[Any]:
    return [{"text": text(at), "label": label(at)} for at in range(count)]


LONG = [
    {"role": "system", "content": "fly " * 80},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
DECODER = {"model": "decoder", "task": {"name": "instruction", "template": "plain"}}
ASKED = [{"prompt": text(at), "completion": f"a ball {at}"} for at in range(6)]

BAD: dict[str, tuple[Any, dict[str, Any]]] = {
    "no file": (None, {"data.train": "no.jsonl"}),
    "no rows": ([], {}),
    "one class": (rows(label=lambda at: "a"), {}),
    "class in two spellings": (rows(label=lambda at: ("1", "1.0", "0")[at % 3]), {}),
    "class nan": (rows(label=lambda at: ("a", "nan")[at % 2]), {}),
    "scores": (rows(40, lambda at: str(at % 12 / 4)), {}),
    "class weights": (rows(), {"training.class_weights": {"c": 2}}),
    "no such column": (rows(), {"data.columns": {"text": "txt"}}),
    "all masked": ([{"messages": LONG}] * 2, {**DECODER, "data.max_length": 40, "data.allow": "all"}),
    "too long": (rows(), {"data.max_length": 5, "data.max_truncated": 0.1}),
    "beyond the positions": (rows(), {"data.max_length": 65}),
    "no room for a prompt": (rows(), {"method": {"name": "prompt", "num_virtual_tokens": 64}}),
    "bad row": ([*rows(), "{"], {}),
    "leakage": (rows(), {"data.test": "rows2.jsonl"}),
    "unknown allow": (rows(), {"data.allow": ["x"]}),
    "no such target": (rows(), {"method": {"name": "lora", "target_modules": ["nothing"]}}),
    "no such module to save": (rows(), {"method": {"name": "lora", "modules_to_save": ["nothing"]}}),
    "layers that are not there": (rows(), {"method": {"name": "lora", "layers": [7]}}),
    "no biases": (ASKED, {**DECODER, "method": "bitfit"}),
    "a task of other models": (rows(), {"model": "decoder", "task": "masked"}),
    "packed classes": (rows(), {"training.packing": True}),
    "packed prompts": (ASKED, {**DECODER, "method": "prompt", "training.packing": True}),
    "float16": (rows(), {"training.compute_type": "float16"}),
    "more processes than rows": (rows(), {"training.processes": 9, "training.per_device_train_batch_size": 4}),
    "no validation to stop by": (rows(), {"data.validation": None, "training.early_stopping_patience": 1}),
    "no such metric": (rows(), {"training.metric_for_best": "bleu"}),
    "no trunk": (rows(), {"training.trunk_cache": True}),
    "no base to measure": (rows(), {"evaluation.baseline": True}),
    "no warm start": (rows(), {"training.warm_start": "nowhere"}),
    "no weights": (rows(), {"model": "unweighted"}),
    "pickled weights": (rows(), {"model": "pickled"}),
    "vocabulary": (rows(), {"model": "small"}),
    "no model": (rows(), {"model": "./nowhere"}),
    "no augmented file": (rows(), {"data.augment": [{"name": "file", "path": "no.jsonl"}]}),
    "held out more than there is": (rows(), {"data.validation": 99}),
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def damaged(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_encoder, folder)
        if name == "small":
            config = BertConfig.from_pretrained(folder, vocab_size=9)
            BertModel(config).save_pretrained(folder)
            return folder
        (folder / "model.safetensors").unlink()
        if name == "pickled":
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        return folder

    def build(given: Any, changes: dict[str, Any]) -> RunConfig:
        for file in ("rows.jsonl", "rows2.jsonl") if given is not None else ():
            content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given)
            (tmp_path / file).write_text(content, encoding="utf-8")
        model = changes.get("model", "encoder")
        known = {"encoder": tiny_encoder, "decoder": tiny_decoder}
        if model in ("unweighted", "pickled", "small"):
            known[model] = damaged(model)
        tree = {
            "data": {"train": "rows.jsonl", "validation": 2, "max_truncated": 1},
            "method": {"name": "lora", "r": 2},
            "training": {"max_steps": 1, "report_to": ["jsonl"], "processes": 1},
            "evaluation": {"resamples": 100, "generate": False},
            "output_dir": "run",
        }
        return RunConfig.build(tree, {**changes, "model": str(known.get(model, model))})

    return build


def fault(work: Callable[[], Any]) -> tuple[type, str] | None:
    try:
        work()
    except GraftwerkError as error:
        return type(error), error.what
    return None


def doctor(config: RunConfig) -> None:
    checked = preflight(config)
    raise_on_severe(checked["findings"], checked["allowed"])


@pytest.mark.parametrize("name", BAD)
def test_doctor_raises_what_train_raises(name: str, build: Any, tmp_path: Path) -> None:
    given, changes = BAD[name]
    config = build(given, changes)
    refused = fault(lambda: train(config))
    assert refused is not None, "this input is a bad one"
    assert fault(lambda: doctor(config)) == refused
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("method", sorted({*METHODS, *SHORTHANDS}))
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_doctor_passes_where_train_works(method: str, kind: str, build: Any) -> None:
    own = {"name": method, "num_virtual_tokens": 4} if method in ("prefix", "prompt", "ptuning") else {"name": method}
    changes = {**(DECODER if kind == "decoder" else {}), "method": own}
    if parse_method(own).starts_from_errors:
        changes["quantization"] = "nf4"
    config = build(ASKED if kind == "decoder" else rows(), changes)
    assert fault(lambda: doctor(config)) == fault(lambda: train(config))
