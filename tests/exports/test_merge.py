"""`merge`: what plain transformers loads answers as the adapter does, for each task and each method that merges."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import graftwerk as gw
from graftwerk.errors import ConfigError, ConflictError, IntegrityError, ModelError, UnsupportedError
from graftwerk.exports import merge as module
from graftwerk.exports.parity import compare, require
from graftwerk.exports.source import FACTS
from graftwerk.serialization.untrusted_files import read_sealed
from graftwerk.tasks.registry import parse_task
from tests.exports.conftest import LABELS, Make
from tests.tiny_text import GNOME, SYNOPSES

METHODS: dict[str, Any] = {
    "lora": {"name": "lora", "r": 4, "target_modules": "all-linear"},
    "rslora": {"name": "lora", "r": 4, "use_rslora": True},
    "dora": {"name": "lora", "r": 4, "use_dora": True},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa"},
    "miss": {"name": "miss", "r": 4},
    "hira": {"name": "hira", "r": 4},
    "shira": {"name": "shira", "r": 4},
    "oft": {"name": "oft"},
    "ia3": "ia3",
    "bitfit": "bitfit",
    "probe": "probe",
    "full": "full",
}
IN_TEXT_MODELS = ("lora", "dora", "miss", "hira", "shira", "oft", "ia3", "bitfit", "full")


@pytest.mark.parametrize("method", METHODS)
def test_merged_classifier_is_a_pipeline_with_the_adapters_scores(
    method: str, tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_encoder, METHODS[method], "classification")
    result = gw.merge(folder, tmp_path / "merged", data=labelled)
    assert result["parity"]["max_abs_difference"] < 1e-5
    assert (result["parity"]["rows"], result["parity"]["agreement"]) == (24, 1.0)
    texts = [json.loads(line)["text"] for line in Path(labelled).read_text(encoding="utf-8").splitlines()]
    ours = gw.open(folder)(texts)
    theirs = pipeline("text-classification", str(result["out"]), top_k=None)(texts, truncation=True, max_length=48)
    for one, other in zip(ours, theirs, strict=True):
        scores = {entry["label"]: entry["score"] for entry in other}
        assert set(scores) == set(LABELS)
        assert len({round(score, 4) for score in scores.values()}) == 3, "equal scores would show no labels"
        assert [scores[label] for label in LABELS] == pytest.approx(list(one["scores"].values()), abs=1e-5)


@pytest.mark.parametrize("task", ["regression", "multilabel", "token-classification", "similarity"])
def test_merged_model_of_other_tasks_answers_as_the_adapter_and_its_card_runs(
    task: str, tiny_encoder: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny_encoder, METHODS["lora"], task)
    result = gw.merge(folder, tmp_path / "merged")
    assert 0 < result["parity"]["max_abs_difference"] < 1e-5
    assert result["parity"]["agreement"] == 1.0
    blocks = (result["out"] / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    assert len(blocks) == 1
    monkeypatch.chdir(result["out"])
    for block in blocks:
        exec(compile(block.partition("\n```")[0], "card", "exec"), {})
    assert gw.export(folder, tmp_path / "peft", to="peft")["parity"]["max_abs_difference"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("method", IN_TEXT_MODELS)
def test_merged_text_model_has_the_adapters_probabilities(
    method: str,
    family: str,
    tiny_decoder: Path,
    text_model: Callable[[str], Path],
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    base = tiny_decoder if family == "llama" else text_model(family)
    if method == "bitfit" and family != "bart":
        with pytest.raises(ModelError, match="has none there"):
            make_adapter(base, method, "summarization")
        return
    folder = make_adapter(base, METHODS[method], "summarization")
    result = gw.merge(folder, tmp_path / "merged", data=str(SYNOPSES), dtype="float32", rows=12)
    assert result["parity"]["max_abs_difference"] < 1e-5
    assert result["parity"]["positions"] > 40, "several positions of each row"


TASKS: dict[str, tuple[str, Any]] = {
    "pairs": ("encoder", {"name": "classification", "pairs": True}),
    **{name: ("encoder", name) for name in ("classification", "regression", "multilabel", "token-classification")},
    "similarity": ("encoder", "similarity"),
    "masked": ("encoder", "masked"),
    "causal": ("decoder", "causal"),
    "instruction": ("decoder", "instruction"),
    "summarization": ("bart", "summarization"),
    "translation": ("mbart50", {"name": "translation", "source_lang": "de_DE", "target_lang": "en_XX"}),
}
"""Every task but `mixture`, whose rows are those of others: a family of models, and the task."""
NOT_IN_PEFT = ("bitfit", "probe", "full")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_task_merges_and_goes_to_peft_with_the_adapters_answers(
    method: str,
    task: str,
    tiny_encoder: Path,
    tiny_decoder: Path,
    text_model: Callable[[str], Path],
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    family, settings = TASKS[task]
    base = {"encoder": tiny_encoder, "decoder": tiny_decoder}.get(family) or text_model(family)
    if method == "probe" and not parse_task(settings).has_head:
        pytest.skip("a linear probe trains a task head, and this task has none")
    if method == "bitfit" and family == "decoder":
        pytest.skip("this model has no biases")
    rows = None
    if task == "pairs":
        rows = str(tmp_path / "pairs.jsonl")
        row = {"text": "a small animal", "text_pair": "it eats grass"}
        Path(rows).write_text("".join(json.dumps({**row, "label": label}) + "\n" for label in LABELS), encoding="utf-8")
    folder = make_adapter(base, METHODS[method], settings)
    merged = gw.merge(folder, tmp_path / "merged", data=rows, dtype="float32")["parity"]
    assert merged["max_abs_difference"] < 1e-5
    if method in NOT_IN_PEFT:
        return
    exported = gw.export(folder, tmp_path / "peft", to="peft", data=rows)["parity"]
    assert exported["max_abs_difference"] < 1e-5


def test_merged_instruction_model_writes_as_evaluated(tiny_decoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tiny_decoder, METHODS["lora"], "instruction")
    out = gw.merge(folder, tmp_path / "merged", dtype="float32")["out"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    predictor = gw.open(folder, evaluation={"max_new_tokens": 8})
    (example,) = predictor._loaded.encode([predictor.task.example_from_text("Name a tool.")])
    written = model.generate(torch.tensor([example.prompt]), max_new_tokens=8)[0, len(example.prompt) :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == predictor("Name a tool.")["output"]


def test_merged_translator_starts_in_the_language_of_the_task(
    text_model: Callable[[str], Path], make_adapter: Make, tmp_path: Path
) -> None:
    task = {"name": "translation", "source_lang": "de_DE", "target_lang": "en_XX"}
    folder = make_adapter(text_model("mbart50"), METHODS["lora"], task)
    out = gw.merge(folder, tmp_path / "merged", data=str(GNOME["de"]))["out"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    written = model.generate(**tokenizer("Datei", return_tensors="pt"), max_new_tokens=4)
    assert written[0, 1] == tokenizer.convert_tokens_to_ids("en_XX")


def test_decoder_classifier_without_pad_token_merges_with_one(
    tiny_decoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_decoder, METHODS["lora"], "classification")
    result = gw.merge(folder, tmp_path / "merged", data=labelled, dtype="float32")
    assert result["parity"]["max_abs_difference"] < 1e-5
    scores = pipeline("text-classification", str(result["out"]))(["a tool", "an animal that eats grass"], batch_size=2)
    assert {score["label"] for score in scores} <= set(LABELS)


def test_auto_dtype_is_the_checkpoints_and_its_rounding_is_said(
    tiny_decoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_decoder, METHODS["lora"], "classification", scale=0.03)
    result = gw.merge(folder, tmp_path / "merged", data=labelled)
    assert result["dtype"] == "bfloat16"
    assert 1e-5 < result["parity"]["max_abs_difference"] < result["parity"]["tolerance"] == 5e-2


def test_merged_where_runs_compute_in_16_bits_is_compared_in_the_type_of_the_weights(
    tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast both round differently, and long texts differ by more than any sane tolerance somewhere."""
    monkeypatch.setenv("GRAFTWERK_COMPUTE_TYPE", "bfloat16")
    folder = make_adapter(tiny_encoder, METHODS["lora"], "classification")
    for made in (gw.merge(folder, tmp_path / "merged", data=labelled), gw.export(folder, tmp_path / "peft", to="peft")):
        assert made["parity"]["max_abs_difference"] < 1e-5
        assert made["parity"]["tolerance"] == 1e-4


@pytest.mark.parametrize("method", ["prefix", "prompt", "houlsby"])
def test_method_that_is_no_weight_change_is_refused_and_nothing_written(
    method: str, tiny_encoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_encoder, method, "classification")
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        gw.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_model_that_answers_otherwise_is_not_written(
    tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny_encoder, METHODS["lora"], "classification")
    load = module._load_plain

    def spoilt(*arguments: Any) -> Any:
        model, tokenizer = load(*arguments)
        with torch.no_grad():
            model.classifier.weight.mul_(1.1)
        return model, tokenizer

    monkeypatch.setattr(module, "_load_plain", spoilt)
    with pytest.raises(IntegrityError, match="does not answer as the adapter does"):
        gw.merge(folder, tmp_path / "merged", data=labelled)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    merged = gw.merge(folder, tmp_path / "merged", data=labelled, max_difference=0.5)
    assert merged["parity"]["tolerance"] == 0.5
    assert merged["bytes"] == sum(path.stat().st_size for path in merged["out"].iterdir())


def test_require_parity_says_how_far_apart_the_answers_are() -> None:
    one = [torch.tensor([[0.7, 0.3]]), torch.tensor([[0.6, 0.4], [0.45, 0.55]]), torch.tensor([[0.2, 0.8]])]
    other = [one[0], torch.tensor([[0.6, 0.4], [0.55, 0.45]]), one[2]]
    found = compare(one, other, 0.01)
    assert (found.rows, found.positions, found.agreement) == (3, 4, 0.75)
    with pytest.raises(
        IntegrityError, match=r"by up to 0.1 on 3 rows \(75.0 % of the likeliest answers agree\)"
    ) as caught:
        require(found, "the merged model")
    assert "up to 0.01 is taken for rounding" in str(caught.value.hint)
    assert require(compare(one, other, 0.2), "the merged model").holds
    scores = compare([torch.tensor([[40.0]])], [torch.tensor([[40.2]])], 0.01)  # relative to the largest
    assert (scores.max_abs_difference, scores.agreement) == (pytest.approx(0.005, rel=1e-4), 1.0)
    assert not compare(one, [one[0], one[1] * torch.nan, one[2]], 0.2).holds
    with pytest.raises(IntegrityError, match=r"answers row 2 with \(1, 2\) probabilities, the adapter with \(2, 2\)"):
        compare(one, [one[0], one[0], one[2]], 0.2)


def test_folder_with_other_content_is_left_alone(tiny_encoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tiny_encoder, METHODS["lora"], "classification")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConflictError, match="holds no export"):
        gw.merge(folder, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    out = gw.merge(folder, tmp_path / "merged")["out"]
    with pytest.raises(ConflictError, match="holds an export already"):
        gw.merge(folder, out)
    (out / "leftover").touch()
    gw.merge(folder, out, overwrite=True)
    assert not (out / "leftover").exists()


def test_unknown_type_and_no_rows_are_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`int4` is no type"):
        gw.merge(tmp_path / "nothing", tmp_path / "merged", dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no comparison without rows"):
        gw.merge(tmp_path / "nothing", tmp_path / "merged", rows=0)


def test_facts_and_files_are_readable_by_colleagues(tiny_encoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tiny_encoder, METHODS["lora"], "classification")
    out = gw.merge(folder, tmp_path / "merged")["out"]
    facts = read_sealed(out / FACTS)
    assert (facts["kind"], facts["task"], facts["labels"]) == ("merged", "classification", list(LABELS))
    assert facts["parity"]["origin"] == "sentences of graftwerk's own"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    (tmp_path / "usual").touch()
    assert modes == {stat.S_IMODE((tmp_path / "usual").stat().st_mode)}


@pytest.mark.parametrize("task", ["classification", "summarization", "instruction", "causal"])
def test_lines_of_the_merged_card_run(
    task: str,
    tiny_encoder: Path,
    tiny_decoder: Path,
    make_adapter: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_encoder if task == "classification" else tiny_decoder
    out = gw.merge(make_adapter(base, METHODS["lora"], task), tmp_path / "merged", dtype="float32")["out"]
    code = (out / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("\n```")[0]
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    said = capsys.readouterr().out
    assert any(label in said for label in LABELS) or task != "classification"


def test_interrupted_merge_leaves_nothing(
    tiny_encoder: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny_encoder, METHODS["lora"], "classification")
    monkeypatch.setattr(module, "_load_plain", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        gw.merge(folder, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
