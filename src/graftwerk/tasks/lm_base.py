"""Base of causal and masked language modelling: rows of plain text, long ones cut into blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from graftwerk.data.formats import recognise
from graftwerk.data.splits_reader import RowFormat
from graftwerk.errors import UnsupportedError
from graftwerk.tasks.base import Example, Predictions, Row, Splits
from graftwerk.tasks.chunking import text_blocks
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example_checks import BLOCKS, special_notes, special_words
from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LanguageModelingTask(TextTask):
    """Abstract; nothing is generated, and the metric is the perplexity of the trained tokens."""

    fields = ("text",)
    metrics = ("perplexity",)
    generates = False
    eos_after_every_block: ClassVar[bool] = False
    """True to append the end tokens to every block, not only to a text's last one."""

    blocks: bool = Field(
        default=True, description="cut a text longer than data.max_length into several rows; false: keep its beginning"
    )

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        name, format = recognise(columns, ("text",))
        return RowFormat(format.parts, key="text", format=name)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Tokenize rows to one or more examples each, in order; those of a row cut into blocks say so in `notes`."""
        front, back = self.special_tokens(tokenizer)
        texts = [row["text"] for row in rows]
        found = text_blocks(
            texts, tokenizer, max_length, front, back, cut=self.blocks, close_all=self.eos_after_every_block
        )
        special = special_words(tokenizer)
        examples = []
        for row, (blocks, num_truncated) in zip(rows, found, strict=True):
            for number, ids in enumerate(blocks, start=1):
                # Tokens truncated from a text count once, at its last block.
                truncated = num_truncated if number == len(blocks) else 0
                written_out = special_notes([row["text"]], special) if number == 1 else ()
                notes = ((BLOCKS,) if len(blocks) > 1 else ()) + written_out
                inputs, labels = self.inputs_and_labels(ids, tokenizer)
                examples.append(Example({"input_ids": inputs}, labels, truncated, row=row, notes=notes))
        return examples

    @abstractmethod
    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Return the special tokens before a block and after a text."""

    @abstractmethod
    def inputs_and_labels(self, block: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Return what the model reads of a block, and its labels: as many token ids, or `IGNORED`."""

    @property
    def decoder(self) -> TextDecoder:
        return PlainTextDecoder(self.title)


@dataclass(frozen=True)
class PlainTextDecoder(TextDecoder):
    """Likelihoods of plain text; nothing is generated.

    Attributes:
        title: The title of the task, for messages.
    """

    title: str

    def source(self, example: Example) -> str | None:
        return None if example.row is None else str(example.row["text"])

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """Raise UnsupportedError, since a text is scored and not answered.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"{self.title.lower()} gives no answers, only likelihoods",
            hint="graftwerk evaluate ... --data gives the perplexity of texts",
        )
