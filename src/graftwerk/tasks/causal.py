"""Causal language modelling on plain text: continued pretraining, to a domain's language.

Every token is trained, the end token too.
"""

from __future__ import annotations

from typing import Any, ClassVar

from graftwerk.tasks.base import Example, Row
from graftwerk.tasks.lm_base import LanguageModelingTask
from graftwerk.tasks.template import begins_texts
from graftwerk.tasks.text import Layout


class Causal(LanguageModelingTask):
    """Each row is a text of its own, begun by the tokenizer's first token where it has one, and ended by its last."""

    name: ClassVar[str] = "causal"
    title: ClassVar[str] = "Causal language modelling"
    layouts: ClassVar[tuple[Layout, ...]] = ("causal",)

    def around(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        front = [tokenizer.bos_token_id] if begins_texts(tokenizer) else []
        return front, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def example(self, ids: list[int], tokenizer: Any, lost: int, row: Row, notes: tuple[str, ...]) -> Example:
        # The first token is predicted by nothing; `TextTask` leaves it out.
        return Example({"input_ids": ids}, list(ids), lost, row=row, notes=notes)
