"""What encoded rows of text say about a run before it begins: answers that cannot be learnt, or never end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graftwerk.data.findings import Finding
from graftwerk.tasks.base import Example
from graftwerk.tasks.text import IGNORED

MASKED = "labels-all-masked"
ENDLESS = "end-untrained"
TORN = "prompt-torn"
SPECIAL = "special-token-in-text"
BLOCKS = "cut-into-blocks"


@dataclass(frozen=True)
class _Meaning:
    message: str
    mend: str
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
}


def check_examples(
    split: str, examples: Sequence[Example], where: Callable[[int], str] | None = None
) -> tuple[Finding, ...]:
    """Counted findings about the encoded rows of one split.

    Args:
        where: The place (`file:line`) of a row, by its index.
    """
    found: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        for note in _notes(example):
            found.setdefault(note, []).append(at)
    return tuple(_finding(code, split, found[code], len(examples), where) for code in _MEANINGS if code in found)


def _notes(example: Example) -> tuple[str, ...]:
    target = example.target
    if isinstance(target, list) and all(label == IGNORED for label in target):
        return (*example.notes, MASKED)
    return example.notes


def _finding(code: str, split: str, rows: list[int], count: int, where: Callable[[int], str] | None) -> Finding:
    meaning = _MEANINGS[code]
    return Finding(
        code,
        f"{len(rows):,} of {count:,} {split} rows {meaning.message}",
        len(rows),
        example=None if where is None else where(rows[0]),
        mend=meaning.mend,
        grave=meaning.grave,
    )
