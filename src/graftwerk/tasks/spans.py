"""Words of a text, tags of words and the spans that they mean.

Tags are BIO (`B-PER` begins a span of the kind `PER`, `I-PER` continues it, `O` is none) or plain (`PER`, `O`: a run of
equal tags is a span). Spans are counted as seqeval does it by default, which is the rule of CoNLL's own script: an `I-`
without a beginning, or of another kind than the word before, begins a span all the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

OUTSIDE = "O"
_WORD = re.compile(r"\w+|[^\w\s]")
_BIO = re.compile(r"[BI]-.+")
_OTHER = re.compile(r"[ESLU]-.+")
_SAME = {"E": "I", "L": "I", "S": "B", "U": "B"}

Span = tuple[int, int, str]
"""First word or character, the one after the last, and the kind."""


def is_bio(tag: str) -> bool:
    """Return True for `O`, `B-...` and `I-...`."""
    return tag == OUTSIDE or _BIO.fullmatch(tag) is not None


def as_bio(tag: str) -> str:
    """Return a tag of BIOES or BILOU as the BIO tag that means the same, any other as it is."""
    return _SAME[tag[0]] + tag[1:] if _OTHER.fullmatch(tag) else tag


def spans_of(tags: Sequence[str], *, plain: bool = False) -> list[Span]:
    """Return the spans of a row of tags, in order.

    Args:
        tags: One a word.
        plain: True if a tag is a kind itself, with no letter in front.
    """
    found: list[Span] = []
    start, kind = 0, ""  # "": no span is open
    for at, tag in enumerate([*tags, OUTSIDE]):
        inside, own = tag != OUTSIDE, tag if plain else tag[2:]
        begins = inside and not plain and tag.startswith("B-")
        if kind and (not inside or begins or own != kind):
            found.append((start, at, kind))
            kind = ""
        if inside and not kind:
            start, kind = at, own
    return found


def words_of(text: str, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return the words of a text as (first character, the one after the last): runs of letters and digits, and signs.

    Args:
        text: The text.
        cuts: Characters at which a word ends in any case.
    """
    found: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        edges = [match.start(), *sorted(cut for cut in set(cuts) if match.start() < cut < match.end()), match.end()]
        found += pairwise(edges)
    return found


def tags_of_spans(text: str, spans: Sequence[Span]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the words of a text and their BIO tags.

    Raises:
        ValueError: A span lies outside of the text, holds no word, or overlaps another.
    """
    words = words_of(text, [edge for start, end, _ in spans for edge in (start, end)])
    tags = [OUTSIDE] * len(words)
    for start, end, kind in spans:
        if not 0 <= start < end <= len(text):
            raise ValueError(f"has the span {start} to {end}, and {len(text)} characters")
        inside = [at for at, (first, last) in enumerate(words) if start <= first and last <= end]
        if not inside:
            raise ValueError(f"has the span {start} to {end}, in which there is no word")
        if any(tags[at] != OUTSIDE for at in inside):
            raise ValueError(f"has the span {start} to {end}, which overlaps another")
        for at in inside:
            tags[at] = f"{'B' if at == inside[0] else 'I'}-{kind}"
    return words, tags
