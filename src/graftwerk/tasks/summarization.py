"""Summarization: a document in, its summary out. T5's way of asking (Raffel et al. 2020) is a prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from graftwerk.tasks.base import Row
from graftwerk.tasks.seq2seq import Seq2SeqTask, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Summarization(Seq2SeqTask):
    """Encoder-decoder models read a prefix and the document; causal ones a template with the document in it."""

    name = "summarization"
    title = "Summarization"
    fields = ("document", "summary")
    metrics = (
        "rougeL", "rougeL_stemmed", "rouge1", "rouge2", "exact_match", "perplexity", "length",
    )  # fmt: skip
    usual_prefix = "summarize: "
    usual_template = "Summarize the following text.\n\n{document}\n\nSummary:\n"

    prefix: str | None = Field(
        default=None,
        description="before the document, for encoder-decoder models; none: 'summarize: ' for T5 and its like, else "
        "nothing",
    )
    template: str | None = Field(
        default=None, description="what a causal model reads, with {document} in it; none: a plain request"
    )

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, value: str | None) -> str | None:
        return check_fields(value, (), None)

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        return check_fields(value, ("document",), "document")

    def words(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {}
