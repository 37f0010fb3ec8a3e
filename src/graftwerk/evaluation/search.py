"""The search for an answer by the task's settings alone, whatever generation settings the base model came with.

A checkpoint's `generation_config.json` tunes that checkpoint's own answers: a repetition penalty, a least length of 56
tokens for news, words that are never written. They would act on the answers of every adapter on it, and make "greedy"
another thing for each base. Kept is what an answer could not be written without: special tokens and where a decoder
starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDED = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
SAID_BY_US = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "do_sample",
        "num_beams",
        "length_penalty",
        "early_stopping",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "use_cache",
        "cache_implementation",
        "transformers_version",
    }
)
"""Settings of a search that ours says itself, or that change no answer of a search without sampling."""


@contextmanager
def own_search(model: PreTrainedModel, task: TextTask, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, ...]]:
    """Make `model.generate` follow only the arguments of the call inside the block, not the base's own settings.

    Yields:
        The settings of the base that would have changed an answer, as ``name=value``.
    """
    theirs = getattr(model, "generation_config", None)
    if theirs is None:
        yield ()
        return
    kept = {name: getattr(theirs, name) for name in NEEDED} | _task_needs(theirs, task, tokenizer)
    model.generation_config = type(theirs)(**kept)
    try:
        yield tuple(
            f"{name}={value}"
            for name, value in theirs.to_diff_dict().items()
            if name not in kept and name not in SAID_BY_US and not name.startswith(("_", "output_"))
        )
    finally:
        model.generation_config = theirs


def _task_needs(theirs: Any, task: TextTask, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the forced and forbidden tokens without which an answer would not be one.

    A first token is forced if the tokenizer begins every target with it, as BART's does, so that it was learnt there;
    a language code is forced by the task itself. Padding stays forbidden (Marian's models can write it).
    """
    needed: dict[str, Any] = {}
    first = theirs.forced_bos_token_id
    if first is not None and task.layout == "encoder-decoder":
        target = tokenizer(text_target="a")["input_ids"]
        if target[:1] == [first]:
            needed["forced_bos_token_id"] = first
    padding = [words for words in theirs.bad_words_ids or () if list(words) == [tokenizer.pad_token_id]]
    if padding:
        needed["bad_words_ids"] = padding
    return needed
