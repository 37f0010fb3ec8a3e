"""Instruction tuning: a causal model learns to answer as the assistant of the rows' conversations does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from graftwerk.data.fields import label_part
from graftwerk.data.formats import conversation, question, question_text, recognise
from graftwerk.data.splits_reader import RowFormat
from graftwerk.errors import ConfigError, DataError
from graftwerk.tasks.chat import encode_conversations, end_ids
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.example_checks import example_notes, special_words
from graftwerk.tasks.generation import Generation
from graftwerk.tasks.splits import Splits
from graftwerk.tasks.template import Choice, template_for
from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ = ("instruction", "chat", "prompt-completion")
OUTPUT = "output"


class Instruction(TextTask):
    """Conversations in any of the formats of `data.formats`; or plain columns, made into instructions by `prompt`."""

    name = "instruction"
    title = "Instruction tuning"
    fields = ("turns",)
    metrics = ("exact_match", "rouge1", "rouge2", "rougeL", "perplexity", "length")
    layouts = ("causal",)

    template: Choice = Field(
        default="auto", description="chat: the model's own template; plain: a plain one; auto: its own where it has one"
    )
    system: str | None = Field(default=None, min_length=1, description="system message of rows that have none")
    prompt: str | None = Field(
        default=None, min_length=1, description="makes the instruction from columns: 'Which kind of thing is {text}?'"
    )
    answer: str | None = Field(
        default=None, min_length=1, description="with `prompt`, makes the answer: '{label}'; none: the column `output`"
    )

    @field_validator("prompt", "answer")
    @classmethod
    def _fields(cls, value: str | None) -> str | None:
        if value is not None and not fields_of(value):
            raise ValueError("names no column in braces: '... {text} ...'")
        return value

    @model_validator(mode="after")
    def _together(self) -> Instruction:
        if self.answer is not None and self.prompt is None:
            raise ValueError("`answer` does nothing without `prompt`")
        return self

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        if self.prompt is None:
            name, format = recognise(columns, READ)
            return RowFormat(
                format.parts,
                key=_asked,
                optional=format.optional,
                answers=format.answers,
                shape=format.shape,
                ask=format.ask,
                format=name,
            )
        asked, answer = fields_of(self.prompt), fields_of(self._answer)
        return RowFormat(
            dict.fromkeys(dict.fromkeys((*asked, *answer)), label_part),
            key=_asked,
            answers=tuple(part for part in answer if part not in asked),
            shape=self._filled,
            ask=self._filled_question,
        )

    def example_from_text(self, text: str) -> Row:
        """Return the row of a bare text to answer: one user turn, or the prompt filled with the text.

        Raises:
            ConfigError: The prompt has several fields, so one text cannot fill it.
        """
        if self.prompt is None:
            return {"turns": [["user", text]]}
        fields = fields_of(self.prompt)
        if len(fields) > 1:
            listed = ", ".join(fields)
            raise ConfigError(
                f"the prompt of this adapter is made from several columns ({listed}), and a text is one",
                where="task.prompt",
                hint="give a file with these columns: --data",
            )
        return self._filled_question({fields[0]: text})

    @property
    def _answer(self) -> str:
        return self.answer or f"{{{OUTPUT}}}"

    def _filled(self, row: dict[str, Any]) -> dict[str, Any]:
        turns = self._filled_question(row)["turns"]
        return conversation([*turns, ["assistant", self._answer.format_map(row)]])

    def _filled_question(self, row: dict[str, Any]) -> dict[str, Any]:
        assert self.prompt is not None
        return question([["user", self.prompt.format_map(row)]])

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """A row whose last turn is not the assistant's gets the target None: it is asked, and no answer is known.

        Raises:
            DataError: the template does not take a row's conversation, with the reason.
            IntegrityError, ModelError, ConfigError, UnsupportedError: the template or tokenizer cannot be used.
        """
        template = template_for(tokenizer, self.template)
        conversations = [self._turns(row) for row in rows]
        encoded = encode_conversations(conversations, template, tokenizer, max_length)
        unfit = [at for at, one in enumerate(encoded) if one.unfit is not None]
        if unfit:
            raise DataError(
                f"the {template.name} template of the model does not take {len(unfit):,} of {len(rows):,} rows:"
                f" {encoded[unfit[0]].unfit}",
                where=(splits.locate(rows, unfit[0]) if splits is not None else None)
                or repr(question_text(rows[unfit[0]]["turns"])[:80]),
                hint="task.template=plain uses a plain template; or leave these rows out",
            )
        special = special_words(tokenizer)
        return [
            Example(
                {"input_ids": one.ids},
                one.labels,
                one.truncated,
                prompt=one.prompt,
                row=row,
                notes=example_notes(one, [content for _, content in turns], special),
            )
            for row, turns, one in zip(rows, conversations, encoded, strict=True)
        ]

    def _turns(self, row: Row) -> list[list[str]]:
        turns: list[list[str]] = row["turns"]
        if self.system is not None and turns[0][0] != "system":
            return [["system", self.system], *turns]
        return turns

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> TextDecoder:
        return ConversationDecoder()

    @property
    def generation(self) -> Generation:
        return ConversationGeneration(self._layout, self.template)


@dataclass(frozen=True)
class ConversationDecoder(TextDecoder):
    """Answers to conversations, compared with the last turn."""

    def reference(self, example: Example) -> str | None:
        if example.row is None or example.target is None:
            return None
        role, content = example.row["turns"][-1]
        return str(content).strip() if role == "assistant" else None

    def source(self, example: Example) -> str | None:
        return None if example.row is None else question_text(example.row["turns"])


@dataclass(frozen=True)
class ConversationGeneration(Generation):
    """Generation that ends where a conversation's template ends a turn.

    Attributes:
        template: The choice of the template, as in the task's settings.
    """

    template: Choice

    def options(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        ends = end_ids(template_for(tokenizer, self.template), tokenizer)
        return {**super().options(model, tokenizer, example), "eos_token_id": ends}


def fields_of(text: str) -> tuple[str, ...]:
    """Return the columns that a prompt names in braces, in order.

    Raises:
        ValueError: something in braces that is no plain name.
    """
    names = []
    for _, name, spec, turn in Formatter().parse(text):
        if name is None:
            continue
        if not name or spec or turn or any(mark in name for mark in ".[]"):
            raise ValueError(f"`{{{name}}}` is no column; a brace that is meant as one is written twice")
        names.append(name)
    return tuple(dict.fromkeys(names))


def _asked(row: Mapping[str, Any]) -> str:
    return question_text(row["turns"])
