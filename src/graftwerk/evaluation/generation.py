"""Generation of answers, in batches of prompts of similar length; answers come in the order of the rows.

A row's answer is the one that it would get alone: rows share a batch only where they share what `generate` is told (the
language to write) and how long their answers may be, and padding is masked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.data.keyed_rng import chance
from graftwerk.devices import is_out_of_memory, release
from graftwerk.evaluation.inference import autocast, device_of, evaluation_mode
from graftwerk.evaluation.sampling import OwnDraws, StopTexts
from graftwerk.evaluation.search import own_search
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.modeling.virtual_positions import positions_taken
from graftwerk.models.hf_logging import quiet
from graftwerk.models.positions import position_limit
from graftwerk.tasks.base import Example
from graftwerk.tasks.text import IGNORED, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE = 1.5
"""Where no limit is given: so many times the longest reference."""
FALLBACK = 64
"""Tokens of an answer where there are no references either."""


def generate(
    model: PreTrainedModel,
    task: TextTask,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    *,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Generate an answer to each prompt: the likeliest, by greedy or beam search, or a sampled one.

    The first of several, if ``settings`` asks for more (`generate_all` gives all of them).

    Longest prompts first: memory runs out, if it does, in the first batch. Then the batch is halved.

    Args:
        model: The model, with whatever adapters are active on it.
        task: The task, which decodes the answers.
        examples: Each with a ``prompt``. One that fills all positions of the model gets an empty answer.
        tokenizer: The model's tokenizer.
        settings: Search, longest answer in tokens, and rows per batch.
        dtype: Type of products; anything but float32 means autocast.
        on_progress: Told (rows done, rows in all).
        say: Told in words when a batch is halved, how many rows had less room for an answer than the others, and which
            generation settings of the base are not used.
    """
    found = generate_all(model, task, examples, tokenizer, settings, dtype=dtype, on_progress=on_progress, say=say)
    return [answers[0] for answers in found]


def generate_all(
    model: PreTrainedModel,
    task: TextTask,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    *,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    streamer: Any = None,
) -> list[list[str]]:
    """Generate `num_return_sequences` answers to each prompt; the arguments are those of `generate`.

    A ``streamer`` (`transformers.generation.BaseStreamer`) is given the tokens of a single greedy or sampled answer.
    """
    limit = settings.max_new_tokens or answer_limit(examples)
    rooms = [min(limit, room) for room in _rooms(model, task, examples, limit)]
    short = sum(room < limit for room in rooms)
    if short:
        said = f"{short:,} of {len(examples):,} prompts leave room for fewer than {limit} tokens of an answer"
        say(f"{said} in the positions of the model")
    answers: list[list[str]] = [[""] * settings.num_return_sequences for _ in examples]
    done = sum(room < 1 for room in rooms)
    size = settings.generation_batch_size
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        autocast(model, dtype),
        quiet(),
        own_search(model, task, tokenizer) as unused,
    ):
        if unused:
            so_that = "" if settings.sampled else ", so that answers are the likeliest"
            say(f"generation settings of the base are not used{so_that}: {', '.join(unused)}")
        for rows in _alike(task, examples, rooms):
            start = 0
            while start < len(rows):
                some = rows[start : start + size]
                try:
                    asked = [examples[row] for row in some]
                    written = _write(model, task, asked, tokenizer, settings, rooms[some[0]], streamer)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error) or len(some) == 1:
                        raise
                    size = len(some) // 2
                    say(f"out of memory while generating: continuing with {size} rows a batch")
                    release()
                    continue
                for row, texts in zip(some, written, strict=True):
                    answers[row] = texts
                start += len(some)
                done += len(some)
                if on_progress is not None:
                    on_progress(done, len(examples))
    return answers


def _write(
    model: PreTrainedModel,
    task: TextTask,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    most: int,
    streamer: Any = None,
) -> list[list[str]]:
    number = settings.num_return_sequences
    prompts = [example.prompt or [] for example in examples]
    options: dict[str, Any] = {"max_new_tokens": most, "num_beams": settings.num_beams, "do_sample": False}
    options["max_length"] = None  # its default is not to count beside `max_new_tokens`
    if settings.sampled:
        from transformers import LogitsProcessorList

        # a row and its number have random numbers of their own, whatever stands beside it in the batch
        keys = [(json.dumps(prompt), copy) for prompt in prompts for copy in range(number)]
        draws = [chance(settings.seed or 0, "answer", prompt, copy) for prompt, copy in keys]
        own = OwnDraws(draws, settings.temperature or 1.0, settings.top_p or 1.0, settings.top_k)
        options["logits_processor"] = LogitsProcessorList([own])
        prompts = [prompt for prompt in prompts for _ in range(number)]
    elif number > 1:
        options["num_return_sequences"] = number
    if streamer is not None:
        options["streamer"] = streamer
    if settings.num_beams > 1:
        options["length_penalty"] = settings.length_penalty
    batch = task.generation.collate_prompts(prompts, tokenizer)
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    if settings.stop:
        from transformers import StoppingCriteriaList

        ends = StopTexts(settings.stop, tokenizer, lambda ids: task.generation.new_tokens(ids, batch))
        options["stopping_criteria"] = StoppingCriteriaList([ends])
    written = model.generate(**batch, **options, **task.generation.options(model, tokenizer, examples[0]))
    tokens = task.generation.new_tokens(written, batch).tolist()
    texts = [_until(task.generation.decode(row, tokenizer), settings.stop) for row in tokens]
    return [texts[start : start + number] for start in range(0, len(texts), number)]


def _until(text: str, stop: Sequence[str]) -> str:
    """Return an answer up to the first of the texts that end it."""
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(ends)].rstrip() if ends else text


def _alike(task: TextTask, examples: Sequence[Example], rooms: Sequence[int]) -> list[list[int]]:
    """Return lists of rows that may share a batch, the longest prompt first in each, sorted by their longest."""
    groups: dict[Any, list[int]] = {}
    for row in sorted(range(len(examples)), key=lambda row: _length(examples[row]), reverse=True):
        if rooms[row] > 0:
            groups.setdefault((task.generation.group(examples[row]), rooms[row]), []).append(row)
    return list(groups.values())


def _rooms(model: PreTrainedModel, task: TextTask, examples: Sequence[Example], limit: int) -> list[int]:
    """Return the number of tokens of an answer that each row's positions leave room for."""
    positions = position_limit(model.config)
    if positions is None:
        return [limit] * len(examples)
    if task.layout == "causal":
        virtual = positions_taken(model)
        return [positions - virtual - _length(example) for example in examples]
    return [positions - 1] * len(examples)  # the decoder's own table, less the token that it starts from


def _length(example: Example) -> int:
    return len(example.prompt or ())


def answer_limit(examples: Sequence[Example]) -> int:
    """Return the limit of an answer in tokens: one and a half times the longest reference."""
    longest = max((_answer_length(example) for example in examples), default=0)
    return int(SPARE * longest) + 1 if longest else FALLBACK


def _answer_length(example: Example) -> int:
    if example.target is None:
        return 0
    return sum(1 for token in example.target if token != IGNORED)
