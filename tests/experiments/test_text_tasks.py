"""Comparisons of tasks that write: BLEU, where more is better, and perplexity, where less is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.compare import Comparison, compare
from tests.experiments.here import InThisProcess
from tests.tiny_text import GNOME, build, rows_of

ANSWER = "Open the menu and print this page."
METHODS = ["full", {"label": "few", "name": "ia3"}]


def made(task: str, family: str, folder: Path, seeds: list[int], **evaluation: Any) -> tuple[Comparison, str]:
    """Every row has the same answer, which full fine-tuning learns in these steps and IA3 does not."""
    rows = [{"source": row["source"], "target": ANSWER, "text": f"{row['source'][:10]}. {ANSWER}"}
            for row in rows_of(GNOME["de"])[:32]]  # fmt: skip
    kept = ("text",) if task == "causal" else ("source", "target")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": str(build(family, folder / "model")),
        "task": task,
        "data": {"train": str(path), "validation": 4, "test": 12, "max_length": 64, "max_truncated": 1.0},
        "training": {"max_steps": 30, "report_to": ["jsonl"], "learning_rate": 2e-2, "eval_steps": 15},
        "evaluation": {"latency_batches": 1, "resamples": 200, "examples": 0, **evaluation},
        "output_dir": str(folder / "cmp"),
    }
    comparison = compare(settings, METHODS, seeds, quiet=True)
    assert comparison.report is not None
    return comparison, words(comparison.report)


def words(page: Path) -> str:
    """What a page says, without its marks."""
    text = page.read_text(encoding="utf-8").partition("<body")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script).*?</\1>", "", text, flags=re.S)).split())


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)


def test_compare_translation_by_bleu(tmp_path: Path) -> None:
    """With one seed: the two models are far apart, and neither method is called better."""
    comparison, page = made("translation", "bart", tmp_path, [0], max_new_tokens=18)
    result = comparison.result
    assert (result["metric"], result["rows"], result["split"]) == ("bleu", 12, "test")
    figures = {method["name"]: method for method in result["methods"]}
    assert set(figures["few"]["metrics"]) == {"bleu", "chrf", "exact_match", "perplexity", "length"}
    assert figures["few"]["figure"]["value"] < 20 < 50 < figures["full"]["figure"]["value"] <= 100
    assert figures["full"]["figure"]["high"] <= 100
    (pair,) = result["differences"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("full", "few", "no difference shown")
    assert pair["low"] > 0
    assert pair["value"] == pytest.approx(figures["full"]["figure"]["value"] - figures["few"]["figure"]["value"])
    assert pair["text"].startswith(f"+{pair['value']:.1f} points [")
    assert pair["text"].endswith("with one seed each, and another may reverse it")
    assert result["front"]["trained_parameters"] == ["few", "full"]
    assert result["recommendation"]["method"] == "full"
    lines = comparison.table().splitlines()
    assert lines[0].split()[:2] == ["method", "BLEU"]
    assert lines[2].startswith(f"full *  {figures['full']['figure']['value']:.1f}")
    assert f"lower by {pair['value']:.1f} [" in lines[3]
    assert "BLEU in points on 12 test rows, mean of 1 seed;" in comparison.table()
    assert "Take full: it has the best value of one seed each, and another seed may reverse that" in page
    assert "↑ BLEU" in page
    assert "BLEU on 12 test rows" in page
    assert "points of BLEU" in page
    assert "majority" not in page
    assert "chrF" in page


def test_compare_language_models_by_perplexity(tmp_path: Path) -> None:
    comparison, page = made("causal", "gpt2", tmp_path, [0, 1])
    result = comparison.result
    assert result["metric"] == "perplexity"
    figures = {method["name"]: method["figure"] for method in result["methods"]}
    assert 1 <= figures["full"]["value"] < figures["few"]["value"]
    (pair,) = result["differences"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("full", "few", "better")
    assert pair["value"] == pytest.approx(figures["full"]["value"] - figures["few"]["value"])
    assert pair["low"] <= pair["value"] <= pair["high"] < 0
    assert pair["text"].startswith(f"better by {-pair['value']:.1f} [")
    assert result["front"]["trained_parameters"] == ["few", "full"]
    assert result["recommendation"]["method"] == "full"
    assert np.isclose(result["resolution"], (pair["high"] - pair["low"]) / 2)
    lines = comparison.table().splitlines()
    assert lines[2].startswith(f"full *{figures['full']['value']:12.1f}")
    assert f"worse by {-pair['value']:.1f} [" in lines[3]
    assert "perplexity (less is better) on 12 test rows" in comparison.table()
    assert "Take full: it is better than few" in page
    assert "Lower is better, further left is cheaper" in page
    assert "in points of perplexity" not in page
    assert "in its own unit, seen so that more is better" in page
