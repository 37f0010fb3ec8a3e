"""Continued pretraining on plain text: the loss is over every token, EOS included."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from graftwerk.tasks.base import Example, Row
from graftwerk.tasks.lm_base import LanguageModelingTask
from graftwerk.tasks.template import adds_bos
from graftwerk.tasks.text import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Causal(LanguageModelingTask):
    """Each row is one text, wrapped in BOS (if the tokenizer adds it) and EOS."""

    name: ClassVar[str] = "causal"
    title: ClassVar[str] = "Causal language modelling"
    layouts: ClassVar[tuple[Layout, ...]] = ("causal",)

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        front = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        return front, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def example(
        self, ids: list[int], tokenizer: PreTrainedTokenizerBase, num_truncated: int, row: Row, notes: tuple[str, ...]
    ) -> Example:
        # Labels equal the input; `NextTokenObjective` shifts them, so that nothing predicts the first token.
        return Example({"input_ids": ids}, list(ids), num_truncated, row=row, notes=notes)
