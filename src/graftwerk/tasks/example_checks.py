"""Checks of encoded text rows before training: answers that cannot be learnt, or never end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graftwerk.data.findings import Issue
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.chat import Encoded
from graftwerk.tasks.example import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = "labels-all-masked"
ENDLESS = "end-untrained"
TORN = "prompt-torn"
SPECIAL = "special-token-in-text"
BLOCKS = "cut-into-blocks"
UNSEPARATED = "pair-unseparated"
WINDOWS = "windows"
INSIDE_WORD = "span-inside-word"


Noted = tuple[int, int]
"""How many rows, and the first of them."""


@dataclass(frozen=True)
class _Meaning:
    message: str
    hint: str
    grave: bool


_MEANINGS: Mapping[str, _Meaning] = {
    MASKED: _Meaning(
        "have no trained token left: their answers did not fit, and nothing is learnt from them",
        "raise `data.max_length`, or shorten the questions",
        True,
    ),
    ENDLESS: _Meaning(
        "have an answer whose end is not trained: the model will not learn to stop",
        "a chat template that ends each assistant turn with a special token, or task.template=plain",
        True,
    ),
    TORN: _Meaning(
        "begin their answer inside a token: asked for an answer, the model will see other tokens than it learnt from",
        "end what stands before the answer with a line break, not with a space",
        False,
    ),
    SPECIAL: _Meaning(
        "hold a special token written out, which the model takes for the real one",
        "take it out of the text",
        False,
    ),
    BLOCKS: _Meaning(
        "are pieces of texts that are too long for one",
        "task.blocks=false keeps the beginning of such a text alone; a longer `data.max_length` cuts fewer",
        False,
    ),
    UNSEPARATED: _Meaning(
        "are pairs whose texts this model's tokenizer joins without a separator",
        "begin the second text with a word that says so (`Hypothesis: ...`), or use an encoder",
        False,
    ),
    WINDOWS: _Meaning(
        "are overlapping pieces of rows that are too long for one",
        "a longer `data.max_length`, as far as the model allows, cuts fewer",
        False,
    ),
    INSIDE_WORD: _Meaning(
        "have a span that begins or ends inside a word: answers end where words do, and cannot be right there",
        "correct the spans, or give tokens and tags",
        False,
    ),
}


def special_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens with a role that no text holds by chance.

    These are the special tokens, also those that were only added to the vocabulary as such, and the marks that the chat
    template is made of.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = [
        token.content
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        if token.special or (not token.content.isalnum() and token.content in template)
    ]
    return tuple(
        token
        for token in dict.fromkeys([*getattr(tokenizer, "all_special_tokens", ()), *added])
        if len(token.strip()) > 2
    )


def special_notes(texts: Sequence[str], special: Sequence[str]) -> tuple[str, ...]:
    """Return the note for a row in which one of the ``special`` words is written out."""
    starts = {word[0] for word in special}
    held = any(start in text for text in texts for start in starts) and any(
        word in text for text in texts for word in special
    )
    return (SPECIAL,) if held else ()


def example_notes(encoded: Encoded, texts: Iterable[str], special: Sequence[str]) -> tuple[str, ...]:
    """Return the codes of problems with an encoded conversation, for `Example.notes`.

    Args:
        encoded: The encoded conversation.
        texts: The texts of its turns.
        special: Words that the tokenizer reads as special tokens, from `special_words`.
    """
    found = {ENDLESS: encoded.endless, TORN: encoded.torn}
    return (*(code for code, is_so in found.items() if is_so), *special_notes(list(texts), special))


def check_examples(
    split: str, examples: Sequence[Example], where: Callable[[int], str] | None = None, task: Task | None = None
) -> tuple[Issue, ...]:
    """Check the encoded rows of one split, and return the problems, counted, as issues.

    Args:
        split: Name of the split.
        examples: The encoded rows.
        where: Function from a row's index to its place (`file:line`), or None.
        task: Decides which labels its loss sees, or None to take every label that is not -100.
    """
    found: dict[str, Noted] = {}
    for at, example in enumerate(examples):
        note(found, at, example, task)
    return issues_from_notes(split, found, len(examples), where)


def note(found: dict[str, Noted], at: int, example: Example, task: Task | None = None) -> None:
    """Count what is odd about row ``at``; ``task`` as for `check_examples`."""
    for code in _notes(example, task):
        count, first = found.get(code, (0, at))
        found[code] = (count + 1, first)


def issues_from_notes(
    split: str, found: Mapping[str, Noted], count: int, where: Callable[[int], str] | None = None
) -> tuple[Issue, ...]:
    """Return counted problems as issues.

    Args:
        split: Name of the split.
        found: For each code the number of rows and the index of the first, from `note`.
        count: Number of rows of the split.
        where: As for `check_examples`.
    """
    return tuple(_finding(code, split, *found[code], count, where) for code in _MEANINGS if code in found)


def _notes(example: Example, task: Task | None) -> tuple[str, ...]:
    target = example.target
    if isinstance(target, list) and not _is_trained(target, task):
        return (*example.notes, MASKED)
    return example.notes


def _is_trained(target: Sequence[int], task: Task | None) -> bool:
    """Return whether the loss sees any label: a causal model predicts none for the first token of a row."""
    if any(label != IGNORED for label in target[1:]):
        return True
    if task is None or not target:
        return any(label != IGNORED for label in target)
    return bool(task.objective.num_targets({"labels": torch.tensor([target], device="cpu")}))


def _finding(code: str, split: str, rows: int, first: int, count: int, where: Callable[[int], str] | None) -> Issue:
    meaning = _MEANINGS[code]
    return Issue(
        code,
        f"{'all' if rows == count > 1 else f'{rows:,} of'} {count:,} {split} rows {meaning.message}",
        rows,
        example=None if where is None else where(first),
        hint=meaning.hint,
        grave=meaning.grave,
        # Nothing could be trained; and no checkpoint chosen, by a loss that is of no token.
        fatal=code == MASKED and rows == count and split in ("train", "validation"),
    )
