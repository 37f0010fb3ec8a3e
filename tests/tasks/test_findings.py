"""Special tokens that a text has written out are found in the rows of every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from graftwerk.models.load import load_config, load_tokenizer
from graftwerk.tasks.base import Splits
from graftwerk.tasks.example_checks import check_examples
from graftwerk.tasks.registry import parse_task

MARK = "<|mark|>"
TASKS: dict[str, tuple[str, Any, dict[str, str]]] = {
    "classification": ("encoder", "classification", {"text": "{}", "label": "a"}),
    "masked": ("encoder", "masked", {"text": "{}"}),
    "causal": ("decoder", "causal", {"text": "{}"}),
    "prompt format": ("decoder", {"name": "summarization", "chat": False}, {"document": "{}", "summary": "b"}),
    "source": ("t5", "summarization", {"document": "{}", "summary": "b"}),
    "target": ("t5", "summarization", {"document": "b", "summary": "{}"}),
    "translation": (
        "mbart50",
        "translation",
        {"source": "{}", "target": "b", "source_lang": "de_DE", "target_lang": "en_XX"},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_check_examples_special_token_in_text_is_reported(
    name: str, tiny_encoder: Path, tiny_decoder: Path, text_model: Callable[[str], Path]
) -> None:
    family, task, row = TASKS[name]
    folder = {"encoder": tiny_encoder, "decoder": tiny_decoder}.get(family) or text_model(family)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([AddedToken(MARK, special=True)])
    rows = [{part: value.format(text) for part, value in row.items()} for text in (f"a {MARK} ball", "a plain ball")]
    bound = parse_task(task).for_model(load_config(str(folder)))
    examples = bound.encode(rows, tokenizer, Splits((), (), (), ("a", "b"), ""), 64)
    (finding,) = [it for it in check_examples("train", examples) if it.code == "special-token-in-text"]
    assert (finding.rows, len(examples)) == (1, 2)
