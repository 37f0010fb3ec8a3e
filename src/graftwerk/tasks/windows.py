"""Long rows of words as windows of tokens that overlap, each word in exactly one of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwerk.errors import ConfigError
from graftwerk.tasks.tokenization import MODEL_INPUTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOWHERE = -1
"""Position of a word that no token stands for."""
SHARED = 4
"""Without a wish, windows share one of so many parts."""


@dataclass(frozen=True)
class Window:
    """Some tokens of a row, and the words that are theirs.

    Attributes:
        inputs: Lists of token ids and the like, as the model is called.
        words: Numbers of the words that are trained and answered here, in order.
        at: The position of each among the tokens, or `NOWHERE`.
    """

    inputs: dict[str, list[int]]
    words: list[int]
    at: list[int]


def windows_of(
    texts: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlap: int | None = None,
    *,
    last: bool = False,
) -> list[list[Window]]:
    """Tokenize texts to windows, and divide the words of each among its windows.

    Args:
        texts: Each text with the places of its words, (first character, the one after the last).
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window, special tokens included.
        overlap: Tokens that neighbouring windows share, or None for a quarter of a window.
        last: True to place a word at its last token instead of its first.

    Returns:
        The windows of each text: one, unless it is too long.

    Raises:
        ConfigError: `max_length` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add()
    room = max_length - special
    if room < 1:
        raise ConfigError(
            f"`max_length: {max_length}` leaves no room for text beside {special} special tokens",
            where="data.max_length",
        )
    stride = room // SHARED if overlap is None else overlap
    if stride >= room:
        raise ConfigError(
            f"windows of {room} tokens cannot share {stride}", where="task.overlap", hint="a smaller overlap"
        )
    if not texts:
        return []
    answer = tokenizer(
        [text for text, _ in texts], truncation=True, max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_special_tokens_mask=True,
        return_attention_mask=False,
    )  # fmt: skip
    names = [name for name in MODEL_INPUTS if name in answer]
    pieces: list[list[int]] = [[] for _ in texts]
    for piece, text in enumerate(answer["overflow_to_sample_mapping"]):
        pieces[text].append(piece)
    found = []
    for own, (_, words) in zip(pieces, texts, strict=True):
        inputs = [{name: list(answer[name][piece]) for name in names} for piece in own]
        masks = [answer["special_tokens_mask"][piece] for piece in own]
        placed = [
            _placed(answer["offset_mapping"][piece], mask, words, last=last)
            for piece, mask in zip(own, masks, strict=True)
        ]
        found.append(_divided(inputs, masks, placed, len(words)))
    return found


def _placed(
    offsets: Sequence[tuple[int, int]], special: Sequence[int], words: Sequence[tuple[int, int]], *, last: bool
) -> dict[int, int]:
    """Return the position of the token of each word that is in a window."""
    starts = [start for start, _ in words]
    placed: dict[int, int] = {}
    for at, ((start, end), is_special) in enumerate(zip(offsets, special, strict=True)):
        if is_special or start == end:
            continue
        # A token may begin before its word, with the space; it belongs to the words whose letters it holds.
        for word in range(max(0, bisect_right(starts, start) - 1), len(words)):
            if words[word][0] >= end:
                break
            letter = words[word][1] - 1 if last else words[word][0]
            if start <= letter < end and (last or word not in placed):
                placed[word] = at
    return placed


def _divided(
    inputs: Sequence[dict[str, list[int]]], masks: Sequence[Sequence[int]], placed: Sequence[dict[int, int]], count: int
) -> list[Window]:
    """Give each word to the window in which it is furthest from an edge at which the row goes on."""
    words: list[list[int]] = [[] for _ in inputs]
    at: list[list[int]] = [[] for _ in inputs]
    owner = 0
    for word in range(count):
        holding = [number for number, own in enumerate(placed) if word in own]
        owner = max(holding, key=lambda number: _context(number, placed[number][word], masks), default=owner)
        words[owner].append(word)
        at[owner].append(placed[owner].get(word, NOWHERE))
    kept = [number for number in range(len(inputs)) if words[number]] or [0]
    return [Window(inputs[number], words[number], at[number]) for number in kept]


def _context(number: int, position: int, masks: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens between a position and the nearest edge of its window that is no end of the row."""
    text = [at for at, special in enumerate(masks[number]) if not special]
    endless = sum(map(len, masks))
    before = endless if number == 0 else position - text[0]
    after = endless if number == len(masks) - 1 else text[-1] - position
    return min(before, after)
