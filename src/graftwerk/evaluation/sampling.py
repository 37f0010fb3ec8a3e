"""Sampling whose random numbers belong to a row: which rows stand beside it in a batch does not change them.

`generate(do_sample=True)` draws from one stream for the whole batch, so that a row's answer would depend on its
neighbours and on every batch before. Here a row has a stream of its own, seeded by its text, from which it takes one
number a token; the token is where that number falls in the cumulated probabilities, the likeliest token first.

Nucleus (top-p) sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.devices import sum_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OwnDraws:
    """A logits processor for greedy search: it leaves a single token possible, the one drawn.

    Args:
        draws: A stream for each row of the batch.
        temperature: Logits are divided by it; above 0.
        top_p: Only the likeliest tokens that together have this probability can be drawn (always at least one).
        top_k: Only so many of the likeliest tokens can be drawn, `top_p` counted among them; or None for all.
    """

    def __init__(
        self, draws: Sequence[random.Random], temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None
    ) -> None:
        self.draws, self.temperature, self.top_p, self.top_k = draws, temperature, top_p, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V), 0 for the token drawn and -inf for the others, from ids (B, T) and logits (B, V)."""
        probabilities = (scores.float() / self.temperature).softmax(-1)
        # stable: equal logits must not be ordered by chance
        likely, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            likely, tokens = likely[:, : self.top_k], tokens[:, : self.top_k]
            likely = likely / likely.sum(-1, keepdim=True)
        exact = sum_dtype(scores.device)
        until = likely.cumsum(-1, dtype=exact)
        before = until - likely
        inside = before < self.top_p  # the first always is
        mass = torch.where(inside, until, 0.0).max(-1).values
        drawn = torch.tensor([draws.random() for draws in self.draws], dtype=exact, device=scores.device)
        place = (until <= (drawn * mass)[:, None]).sum(-1, keepdim=True).clamp(max=inside.sum(-1, keepdim=True) - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, place), 0.0)


class StopTexts:
    """A stopping criterion: a row ends once one of the texts stands at the end of its answer, or just before.

    transformers' own matches strings against the vocabulary's pieces, and fails on tokenizers whose pieces cannot be
    decoded alone (WordPiece) or lack a character of the text. Here the last tokens of each answer are decoded.

    Args:
        stop: Texts that end an answer.
        tokenizer: The model's tokenizer.
        new_tokens: Takes the ids so far, (B, T), and returns those of the answers, (B, A).
    """

    def __init__(
        self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, new_tokens: Callable[[Tensor], Tensor]
    ) -> None:
        self.stop, self.tokenizer, self.new_tokens = tuple(stop), tokenizer, new_tokens
        self._reach = 4 * max(map(len, stop)) + 4  # a character takes at most four tokens, which are bytes then

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return (B,), True for rows that end here, from the ids (B, T) so far."""
        tails = self.new_tokens(input_ids)[:, -self._reach :].tolist()
        texts = [self.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
