"""Generated answers follow the settings of the evaluation, not those that the base model came with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.evaluation.generation import generate
from graftwerk.evaluation.search import own_search
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.text import TextTask
from tests.evaluation.test_generation import ROWS, loaded, settings

THEIRS: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_length": 200,
    "min_new_tokens": 11,
    "forced_eos_token_id": 5,
    "forced_bos_token_id": 5,
    "suppress_tokens": list(range(10, 200)),
    "begin_suppress_tokens": list(range(10, 200)),
    "bad_words_ids": [[token] for token in range(10, 200)],
    "sequence_bias": [[[7], 100.0]],
    "exponential_decay_length_penalty": (1, 9.0),
    "num_return_sequences": 2,
    "num_beams": 4,
    "length_penalty": 9.0,
    "early_stopping": True,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "max_new_tokens": 2,
    "return_dict_in_generate": True,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_generate_ignores_generation_config_of_base(family: str, beams: int, text_model: Callable[[str], Path]) -> None:
    model, task, tokenizer = loaded(text_model(family), Summarization())
    examples = task.encode([{"document": row["source"]} for row in ROWS[:3]], tokenizer, None, 256)
    chosen = settings(num_beams=beams)
    expected = generate(model, task, examples, tokenizer, chosen)
    theirs = model.generation_config
    for name, value in THEIRS.items():
        before = getattr(theirs, name)
        setattr(theirs, name, value)
        said: list[str] = []
        assert generate(model, task, examples, tokenizer, chosen, say=said.append) == expected, name
        assert model.generation_config is theirs
        if name not in ("num_beams", "length_penalty", "early_stopping", "do_sample", "temperature", "top_k"):
            assert [name in text for text in said] in ([True], []), name
        setattr(theirs, name, before)
    theirs.repetition_penalty = 1.1
    generate(model, task, examples, tokenizer, chosen, say=said.append)
    assert "repetition_penalty=1.1" in said[-1]


def _search(model: Any, task: TextTask, tokenizer: Any) -> Any:
    with own_search(model, task, tokenizer):
        return model.generation_config


def test_own_search_keeps_forced_bos_of_targets_only(text_model: Callable[[str], Path]) -> None:
    bart, task, tokenizer = loaded(text_model("bart"), Summarization())
    bart.generation_config.forced_bos_token_id = tokenizer.bos_token_id
    assert _search(bart, task, tokenizer).forced_bos_token_id == tokenizer.bos_token_id
    bart.generation_config.forced_bos_token_id = 9
    assert _search(bart, task, tokenizer).forced_bos_token_id is None


def test_own_search_keeps_decoder_start_and_suppressed_padding(text_model: Callable[[str], Path]) -> None:
    marian, task, tokenizer = loaded(text_model("marian"), Summarization())
    theirs = marian.generation_config
    theirs.bad_words_ids = [[tokenizer.pad_token_id], [9]]
    ours = _search(marian, task, tokenizer)
    assert ours.bad_words_ids == [[tokenizer.pad_token_id]]
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
