"""The lines of an adapter's card are run as they stand, in its folder: with graftwerk, and with PEFT where it can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graftwerk as gw
from tests.exports.conftest import LABELS, Make

PAIRS = {"name": "classification", "pairs": True}
TRANSLATION = {"name": "translation", "source_lang": "de_DE", "target_lang": "en_XX"}


@pytest.mark.parametrize(
    ("family", "task", "method", "title"),
    [
        ("encoder", "classification", "lora", "Classification with lora on tiny-encoder"),
        ("encoder", "classification", "houlsby", "Classification with bottleneck on tiny-encoder"),
        ("decoder", "classification", "ia3", "Classification with ia3 on tiny-decoder"),
        ("decoder", "instruction", "lora", "Instruction with lora on tiny-decoder"),
        ("decoder", "causal", "prompt", "Causal with prompt on tiny-decoder"),
        ("t5", "summarization", "lora", "Summarization with lora on t5"),
        ("mbart50", TRANSLATION, "lora", "Translation with lora on mbart50"),
        ("encoder", PAIRS, "lora", "Classification with lora on tiny-encoder"),
        ("encoder", "regression", "lora", "Regression with lora on tiny-encoder"),
        ("encoder", {"name": "multilabel", "thresholds": [0.0] * 3}, "lora", "Multilabel with lora on tiny-encoder"),
        ("encoder", "token-classification", "lora", "Token-classification with lora on tiny-encoder"),
        ("encoder", "similarity", "lora", "Similarity with lora on tiny-encoder"),
    ],
    ids=[
        "encoder",
        "bottleneck",
        "decoder-classifier",
        "instruction",
        "causal",
        "summarization",
        "translation",
        "pairs",
        "regression",
        "multilabel",
        "token-classification",
        "similarity",
    ],
)
def test_lines_of_the_card_run(
    family: str,
    task: Any,
    method: str,
    title: str,
    tiny_encoder: Path,
    tiny_decoder: Path,
    text_model: Callable[[str], Path],
    make_adapter: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = {"encoder": tiny_encoder, "decoder": tiny_decoder}.get(family) or text_model(family)
    folder = make_adapter(base, method, task)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"# {title}\n" in card.replace("\\", "")
    blocks = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(blocks) == (1 if method == "houlsby" else 2)
    monkeypatch.chdir(folder)
    for code in blocks:
        capsys.readouterr()
        exec(compile(code, "card", "exec"), {})
        said = capsys.readouterr().out
        assert said
        assert any(label in said for label in LABELS) or task not in ("classification", PAIRS, "token-classification")
        assert all(label in said for label in LABELS) or not str(task).startswith("{'name': 'multilabel'")


@pytest.mark.parametrize("task", [PAIRS, "similarity"], ids=["pairs", "similarity"])
def test_lines_of_the_card_of_a_merged_model_run(
    task: Any,
    tiny_encoder: Path,
    make_adapter: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"text": "a small animal", "text_pair": "it eats grass"}
    lines = [row | ({"label": LABELS[at]} if task == PAIRS else {"score": at}) for at in range(2)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gw.merge(make_adapter(tiny_encoder, "lora", task), tmp_path / "merged", data=str(rows))
    monkeypatch.chdir(tmp_path / "merged")
    (code,) = re.findall(r"```python\n(.*?)\n```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out


def test_card_offers_merging_only_where_it_can(tiny_encoder: Path, make_adapter: Make) -> None:
    lines = {
        method: (make_adapter(tiny_encoder, method, "classification") / "README.md").read_text(encoding="utf-8")
        for method in ("lora", "prefix", "full")
    }
    offered = {method: "graftwerk merge . --out ../merged" in card for method, card in lines.items()}
    assert offered == {"lora": True, "prefix": False, "full": True}


def test_base_inside_of_a_package_gets_no_lines_of_peft(tiny_encoder: Path, make_adapter: Make) -> None:
    from graftwerk.serialization.usage import loadable, peft_lines

    own = {"base": {"architecture": "BertForSequenceClassification"}, "labels": list(LABELS)}
    assert peft_lines(own, {"peft_type": "LORA"}, "org/model") is not None
    assert peft_lines(own, {"peft_type": "LORA"}, "pkg://package/model") is None
    assert not loadable("models/base.gguf")
