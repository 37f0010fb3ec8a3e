"""A tiny encoder-decoder that writes nonsense and then ends, and rows to augment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory, gloss_texts: list[str]) -> Path:
    """A BART folder, random weights of width 16, biased to end its answers. Do not write into it."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    from tests.tiny_text import word_piece_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-writer"
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = word_piece_tokenizer(gloss_texts, special, "<s> $A </s>")
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        init_std=0.5,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias[0, tokenizer.eos_token_id] = 6.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = [
    "a bird that sings at night",
    "the act of putting something in order",
    "an insect with long hind legs that can jump",
    "food made of flour and water that is baked",
    "one",
    "any of various small animals that live in trees and are active at night",
]


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    return [{"source": text, "target": f"{text.upper()} {place}", "id": place} for place, text in enumerate(TEXTS)]


@pytest.fixture
def labelled() -> list[dict[str, Any]]:
    return [{"text": text, "label": f"class {place % 2}"} for place, text in enumerate(TEXTS)]
