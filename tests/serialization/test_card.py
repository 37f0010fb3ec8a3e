"""The model card: it says what was measured, and hostile text in it stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from graftwerk.serialization.card import block, model_card, text

OWN: dict[str, Any] = {
    "name": "news",
    "base": {"name": "someone/bert", "architecture": "BertForSequenceClassification", "fingerprint": "ab12"},
    "method": {"name": "lora", "r": 8},
    "labels": ["bad", "good"],
    "task": "classification",
    "data": {"origin": "reviews.csv", "fingerprint": "cd34", "rows": {"train": 2000, "test": 500}},
    "metrics": {"test": {"accuracy": {"value": 0.7912, "low": 0.751, "high": 0.82}}},
    "parameters": {"trained": 12345, "share": 0.0123},
    "cost": {"training_seconds": 91.6},
    "command": "graftwerk train run.yaml seed=1",
    "versions": {"graftwerk": "0.1.0", "torch": "2.13"},
}
CONFIG = {"peft_type": "LORA"}


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


def test_model_card_states_every_fact() -> None:
    card = model_card(OWN, CONFIG)
    assert front_matter(card) == {"base_model": "someone/bert", "library_name": "peft", "tags": ["graftwerk", "lora"]}
    for words in (
        "# news",
        "someone/bert",
        "`ab12`",
        "12,345, 1.23 %",
        "bad, good",
        "| test | accuracy | 0.791 | 0.751 to 0.820 |",
        "reviews.csv",
        "train 2,000, test 500",
        "graftwerk train run.yaml seed=1",
        "92 seconds",
        "torch 2.13",
        "No licence was given",
    ):
        assert words in card, words


def test_model_card_more_than_fifty_labels_are_truncated_and_counted() -> None:
    labels = [f"label{at:02d}" for at in range(53)]
    assert "label49 and 3 more" in model_card({**OWN, "labels": labels}, CONFIG)
    assert "more" not in model_card({**OWN, "labels": labels[:50]}, CONFIG).partition("labels:")[2].partition("\n")[0]


def test_model_card_data_origin_is_listed() -> None:
    origin = {
        "train": "reviews.csv",
        "test": 500,
        "columns": {"text": "review", "label": "stars"},
        "filter": {},
        "rows": {"train": 2000},
    }
    card = model_card({**OWN, "data": {**OWN["data"], "origin": origin}}, CONFIG)
    said = card.partition("## Data\n\n")[2].partition("\n\n")[0].splitlines()
    assert said == [
        "- train: reviews.csv",
        "- test: 500",
        "- columns: text = review, label = stars",
        "- rows: train 2,000, test 500",
        "- fingerprint: `cd34`",
    ]


def test_model_card_omits_sections_without_facts() -> None:
    card = model_card({}, {})
    assert "Metrics" not in card
    assert "Repeat" not in card
    assert front_matter(card)["tags"] == ["graftwerk", "adapter"]
    assert front_matter(model_card({**OWN, "license": "mit"}, {"peft_type": "GRAFTWERK_FULL"}))["license"] == "mit"
    assert "library_name" not in front_matter(model_card(OWN, {"peft_type": "GRAFTWERK_FULL"}))


HOSTILE = [
    "</code><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "a | b | c",
    "x\n# Heading\n---\nlibrary_name: evil",
    "`code` ``` fence",
    "---\ntags: [x]\n---",
    "\u202egnp.exe",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    '"}\n```\n<script>',
    "${7*7} {{7*7}} $x$",
    "@everyone :tada:",
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bad", HOSTILE)
def test_model_card_escapes_hostile_text(bad: str, nested: bool) -> None:
    origin = {bad: bad, "columns": {bad: bad}} if nested else bad
    own = {
        **OWN,
        "name": bad,
        "base": {"name": bad, "architecture": bad, "fingerprint": bad},
        "method": {"name": bad},
        "labels": [bad],
        "task": bad,
        "data": {"origin": origin, "fingerprint": bad, "rows": {bad: 1}},
        "metrics": {bad: {bad: {"value": bad, "low": 1, "high": 2}}},
        "versions": {bad: bad},
        "license": bad,
    }
    card = model_card(own, {"peft_type": bad})
    assert card.count("\n---\n") == 1
    assert front_matter(card).keys() <= {"base_model", "library_name", "license", "tags"}
    headings = [line for line in outside_fences(card).splitlines() if line.startswith("#")]
    assert [line for line in headings if line.startswith("## ")] == [
        "## Metrics", "## Data", "## Settings", "## Use it", "## Repeat", "## Limits and licence",
    ]  # fmt: skip
    assert len(headings) == 7
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
    plain = outside_fences(card)
    assert "<" not in plain
    assert "](" not in plain.replace("\\](", "")
    assert "\u202e" not in card


def outside_fences(card: str) -> str:
    """The card without its front matter and without what stands in code blocks, read as CommonMark reads fences: a
    block ends at the first line that holds nothing but at least as many backticks as opened it, up to three spaces in.
    """
    lines, fence = [], 0
    for line in card.split("---\n", 2)[2].splitlines():
        indent = len(line) - len(line.lstrip(" "))
        ticks = len(line.strip(" ")) - len(line.strip(" ").lstrip("`"))
        alone = indent <= 3 and set(line.strip(" \t")) == {"`"}
        if not fence and indent <= 3 and ticks >= 3:
            fence = ticks
        elif fence and alone and ticks >= fence:
            fence = 0
        elif not fence:
            lines.append(line)
    assert not fence, "a code block is never closed"
    return "\n".join(lines)


@given(st.text(max_size=60))
def test_text_returns_one_line(value: str) -> None:
    line = text(value)
    assert len(line.splitlines()) <= 1
    assert "<" not in line


@given(st.text(max_size=60) | st.lists(st.sampled_from(["`", "```", "````", "\n", " ", "x"]), max_size=12).map("".join))
@example("```")
@example("x\n````\ny")
@example("   `````\n```")
def test_block_content_with_backticks_stays_inside(value: str) -> None:
    """Whatever runs of backticks it holds, what comes after the block is all that stands outside."""
    assert outside_fences(f"---\n---\n{block(value)}\nafter") == "after"


def test_text_over_limit_ends_in_ellipsis() -> None:
    assert text("a" * 60, 60) == "a" * 60
    assert text("a" * 61, 60) == "a" * 59 + "…"


def test_model_card_redacts_secrets() -> None:
    own = {
        **OWN,
        "command": "HF_TOKEN=hf_abcdefghijklmnopqrstuv graftwerk train run.yaml --api-key=topsecret",
        "data": {"origin": "https://me:pa55word@example.org/data.csv"},
        "labels": ["sk-abcdefghijklmnopqrstuvwxyz"],
    }
    card = model_card(own, CONFIG)
    for secret in ("hf_abc", "topsecret", "pa55word", "sk-abc"):
        assert secret not in card
    assert "example.org/data.csv" in card
    assert json.dumps("someone/bert") in card
