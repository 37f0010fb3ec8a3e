"""Plain text as token blocks: each row its own, a long one cut into pieces; for tasks that learn from text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftwerk.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 2
"""Tokens of text in a block: of one token nothing can be learnt in its context."""


def text_blocks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    front: Sequence[int],
    back: Sequence[int],
    *,
    cut: bool,
    close_all: bool = False,
) -> list[tuple[list[list[int]], int]]:
    """Cut texts into blocks; return the blocks of each text, and the number of its tokens in none of them.

    A text that fits is one block, ``front`` and ``back`` around it. One that does not is cut into blocks of
    ``max_length`` that begin with ``front``, the last of them with ``back`` at its end.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.
        max_length: Largest block in tokens.
        front: Special tokens before each block.
        back: Special tokens after a text's last block.
        cut: True to cut a long text into several blocks, False to drop what does not fit.
        close_all: True to end every block of a text with ``back``, not only its last.

    Raises:
        ConfigError: There is no room for text beside the special tokens.
    """
    room = max_length - len(front) - len(back)
    if room < LEAST:
        raise ConfigError(
            f"`max_length: {max_length}` leaves no room for text beside {len(front) + len(back)} special tokens",
            where="data.max_length",
        )
    if not texts:
        return []
    answer = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [_blocks(list(ids), room, list(front), list(back), cut, close_all) for ids in answer["input_ids"]]


def _blocks(
    ids: list[int], room: int, front: list[int], back: list[int], cut: bool, close_all: bool
) -> tuple[list[list[int]], int]:
    if len(ids) <= room:
        return [[*front, *ids, *back]], 0
    if not cut:
        return [[*front, *ids[:room], *back]], len(ids) - room
    pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
    lost = 0
    if len(pieces[-1]) < LEAST:
        lost = len(pieces.pop())
    last = len(pieces) - 1
    blocks = [[*front, *piece, *(back if close_all or at == last else ())] for at, piece in enumerate(pieces)]
    return blocks, lost
