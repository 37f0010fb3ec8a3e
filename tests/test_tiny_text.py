"""The tests' own tokenizers: the same pieces in every process, or a model's answers differ from run to run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_text import bart_tokenizer, t5_tokenizer, texts, word_piece_tokenizer


def digest(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:8]


@pytest.mark.parametrize(
    ("kind", "expected"), [("word pieces", "fda13890"), ("byte pairs", "9e31ae01"), ("unigrams", "1e24b304")]
)
def test_trained_tokenizers_are_the_same_in_every_process(kind: str, expected: str, tmp_path: Path) -> None:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    build = {
        "word pieces": lambda: word_piece_tokenizer(texts(), special, "[CLS] $A [SEP]"),
        "byte pairs": lambda: bart_tokenizer(tmp_path),
        "unigrams": lambda: t5_tokenizer(tmp_path),
    }
    assert digest(build[kind]()) == expected


def test_word_piece_tokenizer_frames_and_splits_text() -> None:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_piece_tokenizer(["low lower lowest", "low new newer"], special, "[CLS] $A [SEP]")
    assert tokenizer.tokenize("lower [CLS] zzz") == ["lower", "[CLS]", "[UNK]"]
    assert tokenizer("low")["input_ids"] == tokenizer.convert_tokens_to_ids(["[CLS]", "low", "[SEP]"])
    assert tokenizer.decode(tokenizer("newer low")["input_ids"], skip_special_tokens=True) == "newer low"
