"""Answers that the model writes itself: in batches of prompts of like length, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graftwerk.evaluate.forward import autocast, device_of, evaluation_mode
from graftwerk.evaluate.settings import EvaluationSettings
from graftwerk.tasks.base import Example
from graftwerk.tasks.text import TextTask

SPARE = 1.5
"""Where no limit is given: so many times the longest reference."""
FALLBACK = 64
"""Tokens of an answer where there are no references either."""


def generate(
    model: Any,
    task: TextTask,
    examples: Sequence[Example],
    tokenizer: Any,
    settings: EvaluationSettings,
    *,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's own answer to each prompt, by greedy or beam search.

    Longest prompts first: memory runs out, if it does, in the first batch.

    Args:
        examples: Each with a ``prompt``.
        on_progress: Told (rows done, rows in all).
    """
    limit = settings.max_new_tokens or answer_limit(examples)
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt or ()), reverse=True)
    answers: list[str] = [""] * len(examples)
    options: dict[str, Any] = {"max_new_tokens": limit, "num_beams": settings.num_beams, "do_sample": False}
    if settings.num_beams > 1:
        options["length_penalty"] = settings.length_penalty
    done = 0
    with evaluation_mode(model), torch.inference_mode(), autocast(model, dtype):
        while done < len(order):
            rows = order[done : done + settings.generation_batch_size]
            prompts = [examples[row].prompt or [] for row in rows]
            batch = task.collate_prompts(prompts, tokenizer)
            batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
            written = model.generate(**batch, **options, **task.generation_options(model, tokenizer, examples[rows[0]]))
            for row, tokens in zip(rows, task.new_tokens(written, batch).tolist(), strict=True):
                answers[row] = task.decode(tokens, tokenizer)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, len(order))
    return answers


def answer_limit(examples: Sequence[Example]) -> int:
    """Tokens that an answer may have: half as much again as the longest reference."""
    longest = max((_answer_length(example) for example in examples), default=0)
    return int(SPARE * longest) + 1 if longest else FALLBACK


def _answer_length(example: Example) -> int:
    if example.target is None:
        return 0
    return sum(1 for token in example.target if token != -100)
