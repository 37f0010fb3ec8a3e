"""Rows and encoded rows, the data that the parts of a task hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row as the task understands it: the parts (`text`, `label`) by name, whatever the columns were called."""

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Attributes:
        inputs: Lists of token ids and the like, as the model is called.
        target: The value that the loss compares with: a class id; or token ids, `IGNORED` for tokens that are not
            trained. None if it is unknown.
        truncated: Tokens that did not fit.
        prompt: For tasks that generate, the token ids that an answer follows; otherwise None.
        row: The row that the example came from, for metrics that compare texts.
        notes: Codes of `example_checks` for what is odd about the example, for the checks before training.
    """

    inputs: dict[str, list[int]]
    target: Any
    truncated: int = 0
    prompt: list[int] | None = None
    row: Row | None = None
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Return the number of input tokens."""
        return len(self.inputs["input_ids"])
