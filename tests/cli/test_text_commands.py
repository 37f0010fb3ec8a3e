"""Tasks that write, by commands alone on tiny models: train, evaluate with a baseline, predict, the page."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import Run
from tests.tiny_text import GNOME, SYNOPSES, build


@pytest.mark.parametrize(("task", "family"), [("translation", "mbart50"), ("summarization", "llama")])
def test_text_task_commands_with_baseline(task: str, family: str, graftwerk: Run, tmp_path: Path) -> None:
    config = {
        "model": str(build(family, tmp_path / "model")),
        "task": task,
        "data": {
            "train": str(GNOME["de"] if task == "translation" else SYNOPSES), "max_train_rows": 8,
            "validation": 2, "test": 3, "max_length": 200, "max_truncated": 1.0,
        },
        "method": {"name": "lora", "r": 2},
        "training": {"max_steps": 2, "report_to": ["jsonl"], "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 4, "latency_batches": 1, "resamples": 100, "examples": 2, "baseline": True},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = graftwerk("train", tmp_path / "run.yaml", "-q")
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    main = "bleu" if task == "translation" else "rougeL"
    assert manifest["metrics"]["test"][main]["signature"]
    assert manifest["baseline"]["test"]["perplexity"]["value"] != manifest["metrics"]["test"]["perplexity"]["value"]
    assert {"sacrebleu" if task == "translation" else "rouge-score", "tokenizers"} <= set(manifest["versions"])
    assert [set(example) for example in manifest["examples"]] == [{"source", "reference", "before", "after"}] * 2
    if task == "translation":
        assert manifest["task_settings"]["source_lang"] == "de_DE"
        assert "|tok:13a|" in manifest["metrics"]["test"]["bleu"]["signature"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What it writes" in page
    assert "The base alone" in page

    said = graftwerk("evaluate", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    assert said.json["metrics"][main]["value"] == pytest.approx(manifest["metrics"]["test"][main]["value"])
    assert said.json["examples"] == manifest["examples"]
    assert set(said.json["baseline"]["metrics"]) == set(said.json["metrics"])

    said = graftwerk("predict", tmp_path / "run", "Drucken Sie.", "Ein Paket.", "--json")
    assert said.code == 0, said.err
    assert [set(row) for row in said.json["predictions"]] == [{"output"}, {"output"}]
    lines = graftwerk("predict", tmp_path / "run", "Drucken Sie.").out.splitlines()
    assert lines == [" ".join(said.json["predictions"][0]["output"].split())]

    longer = graftwerk("evaluate", tmp_path / "run", "max_new_tokens=9", "evaluation.num_beams=2", "--json")
    assert longer.code == 0, longer.err
    assert [row["after"] for row in longer.json["examples"]] != [row["after"] for row in manifest["examples"]]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8")) == manifest
    written = graftwerk("predict", tmp_path / "run", "Drucken Sie.", "--set", "max_new_tokens=9", "--json").json
    assert len(written["predictions"][0]["output"]) > len(said.json["predictions"][0]["output"])
    several = ("--set", "temperature=2", "--set", "num_return_sequences=3", "--set", "seed=1")
    asked = ("predict", tmp_path / "run", "Drucken Sie.", *several, "--set", "stop=[xyz]")
    sampled = graftwerk(*asked, "--json").json["predictions"][0]["output"]
    assert len(sampled) == len(set(sampled)) == 3
    assert graftwerk(*asked).out.splitlines() == [" ".join(text.split()) for text in sampled]
    refused = graftwerk("evaluate", tmp_path / "run", "temperature=2", "num_return_sequences=2")
    assert (refused.code, "`predict` gives several" in refused.err) == (2, True)
    assert "did you mean `num_beams`" in graftwerk("evaluate", tmp_path / "run", "num_beam=2").err
    assert "settled by the training" in graftwerk("evaluate", tmp_path / "run", "training.seed=2").err


SUMMARIES = {"train": str(SYNOPSES), "max_length": 200}
PAIRS = {"train": str(GNOME["de"]), "max_length": 128}
GIVEN = {
    "summarization": {"document": "It prints what you draw."},
    "translation": {"source": "Drucken Sie."},
    "instruction": {"prompt": "Drucken Sie."},
}
"""What a file is to hold whose rows are answered: no answers."""
CASES = {
    "t5-summarization": ("t5", "summarization", SUMMARIES, "rougeL"),
    "bart-summarization": ("bart", "summarization", SUMMARIES, "rougeL"),
    "causal-translation": ("gpt2", "translation", PAIRS, "bleu"),
    "chat-translation": ("llama", "translation", PAIRS, "bleu"),
    "instruction": ("llama", "instruction", {**PAIRS, "columns": {"prompt": "source", "completion": "target"}},
                    "exact_match"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_text_task_train_evaluate_predict(
    case: str, graftwerk: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, task, data, main = CASES[case]
    config = {
        "model": str(build(family, tmp_path / "model")),
        "task": task,
        "data": {"max_train_rows": 6, "validation": 2, "test": 2, "max_truncated": 1.0, **data},
        "method": {"name": "lora", "r": 2},
        "training": {"max_steps": 2, "report_to": ["jsonl"], "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 3, "latency_batches": 1, "resamples": 100, "examples": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = graftwerk("train", tmp_path / "run.yaml", "-q")
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    said = graftwerk("evaluate", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    for name in (main, "perplexity"):
        assert said.json["metrics"][name]["value"] == pytest.approx(manifest["metrics"]["test"][name]["value"]), name
    assert said.json["rows"] == 2

    (text,) = GIVEN[task].values()
    (tmp_path / "asked.jsonl").write_text(json.dumps(GIVEN[task]) + "\n", encoding="utf-8")
    of_file = graftwerk(
        "predict", tmp_path / "run", "--data", tmp_path / "asked.jsonl",
        *(f"--column={name}={name}" for name in GIVEN[task]), "--json",
    )  # fmt: skip
    assert of_file.code == 0, of_file.err
    of_text = graftwerk("predict", tmp_path / "run", text, "--json")
    assert of_text.code == 0, of_text.err
    assert of_text.json["predictions"] == [{"output": of_file.json["predictions"][0]["output"]}]
    assert of_file.json["predictions"][0]["source"] == text

    kept = graftwerk("errors", tmp_path / "run", "--all", "--json").json
    assert kept["rows"] == 2
    assert all({"source", "true", "predicted", "wrong", "error"} <= set(row) for row in kept["predictions"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n"))
    (turn,) = graftwerk("chat", tmp_path / "run", "--json").json["predictions"]
    assert turn == {"text": text, "output": of_text.json["predictions"][0]["output"]}
