"""The base of the tasks that answer a text, or a pair of texts, with one vector: classes, a score, several labels.

All of them use transformers' head for sequence classification: encoders answer from their first or pooled position,
decoders from the last position that is not padding. A pair is encoded as the tokenizer encodes pairs, token types and
separators included, and one that is too long loses tokens of the longer text first (`longest_first`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from graftwerk.data.fields import Part, text_part
from graftwerk.data.settings import DataSettings, source_name
from graftwerk.data.splits_reader import RowFormat, read_splits
from graftwerk.data.stream import read_stream
from graftwerk.errors import ConfigError
from graftwerk.tasks.base import Issue, Task
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.example_checks import UNSEPARATED, special_notes, special_words
from graftwerk.tasks.splits import Splits, splits_of, splits_of_stream
from graftwerk.tasks.tokenization import encode_pairs, encode_texts, separates_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR = "text_pair"
"""The field of the second text."""


class SequenceTask(Task):
    """Abstract; subclasses know what the answer of a row is."""

    has_head = True
    answer: ClassVar[str]
    """The field of a row that is predicted."""

    pairs: bool | None = Field(
        default=None,
        description="rows are pairs of texts, `text` and `text_pair`; none: they are if there is a column for the "
        "second",
    )

    # -- rows ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def answer_part(self) -> Part:
        """Return the reader of the answer's value."""

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        if not (PAIR in columns if self.pairs is None else self.pairs):
            return self._labelled(RowFormat({"text": text_part, self.answer: self.answer_part}, key="text"))
        parts = {"text": text_part, PAIR: text_part, self.answer: self.answer_part}
        return self._labelled(RowFormat(parts, key=_both, more_fields=(PAIR,)))

    def _labelled(self, format: RowFormat) -> RowFormat:
        return replace(format, answers=(self.answer,))

    def resolved(self, splits: Splits) -> Self:
        """Return the task that knows if its rows are pairs."""
        first = next(iter(splits.train), None)
        return self if first is None else self.model_copy(update={"pairs": PAIR in first})

    def example_from_text(self, text: str) -> Row:
        """Return a row of a text; of a pair, both texts stand in one with a tab between them.

        Raises:
            ConfigError: The task is about pairs, and there is no second text.
        """
        if not self.pairs:
            return super().example_from_text(text)
        first, _, second = text.partition("\t")
        if not (first.strip() and second.strip()):
            raise ConfigError(
                f"the adapter answers pairs of texts, and {text[:60]!r} is one text",
                hint="put a tab between the two; or give rows with `text` and `text_pair` as data (--data)",
            )
        return {"text": first, PAIR: second}

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        """Read, check and split the rows; nothing of a model is needed or loaded.

        Raises:
            ConfigError: no such source, column or split size; some splits have pairs and others do not.
            DataError: unreadable or unusable rows, answers that nothing can be learnt from.
            AdapterError: the rows have labels that ``labels`` has not.
            ResourceError: a source cannot be reached.
        """
        source = "several sets" if data.sets else source_name(data.source)
        if data.streaming:
            streamed = read_stream(data, self.row_format, self.fields)
            refuse_mixed(streamed.formats, source)
            rows = {"train": streamed.rows, **{split: part.rows for split, part in streamed.held.items()}}
            answers: Mapping[str, Any] = streamed.classes or self._answers(rows)
            names, said = self.check_answers(answers, labels, source)
            return splits_of_stream(data, streamed, self.fields, labels=names, findings=said)
        chosen, findings = read_splits(data, self.row_format)
        refuse_mixed({split: part.reading for split, part in chosen.items() if len(part.indices)}, source)
        names, said = self.check_answers(
            self._answers({split: part.rows for split, part in chosen.items()}), labels, source
        )
        return splits_of(data, chosen, [*findings, *said], self.fields, labels=names)

    def _answers(self, rows: Mapping[str, Iterable[Row]]) -> dict[str, list[Any]]:
        return {split: [row[self.answer] for row in part] for split, part in rows.items()}

    @abstractmethod
    def check_answers(
        self, answers: Mapping[str, Any], labels: Sequence[str] | None, source: str
    ) -> tuple[tuple[str, ...], tuple[Issue, ...]]:
        """Return the label names, and the issues found in the answers.

        Args:
            answers: The answers of the rows of each split, or the number of rows of each.
            labels: The names that an adapter has already, or None.
            source: For messages.

        Raises:
            DataError, AdapterError: As for `read`.
        """

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Encode rows in order; pairs have `text_pair`. A row without an answer gets the target None.

        Raises:
            DataError: An answer that the task does not know.
        """
        targets = self.targets_of(rows, splits)
        pairs = bool(rows) and PAIR in rows[0]
        if pairs:
            encoded = encode_pairs([(row["text"], row[PAIR]) for row in rows], tokenizer, max_length)
        else:
            encoded = encode_texts([row["text"] for row in rows], tokenizer, max_length)
        special = special_words(tokenizer)
        torn = (UNSEPARATED,) if pairs and not separates_pairs(tokenizer) else ()
        return [
            Example(inputs, target, truncated, notes=(*torn, *special_notes(texts_in(row), special)))
            for row, (inputs, truncated), target in zip(rows, encoded, targets, strict=True)
        ]

    @abstractmethod
    def targets_of(self, rows: Sequence[Row], splits: Splits) -> list[Any]:
        """Return the target of each row, None for a row without an answer.

        Raises:
            DataError: An answer that the task does not know.
        """

    # -- model -----------------------------------------------------------------------------------------------------

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification


def texts_in(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row: one, or two of a pair."""
    return [str(row[part]) for part in ("text", PAIR) if part in row]


def refuse_mixed(formats: Mapping[str, RowFormat], source: str) -> None:
    """Raise ConfigError if the rows of some splits are pairs of texts and those of others are not.

    Args:
        formats: The format of the rows of each split that has any.
        source: For the message.

    Raises:
        ConfigError: They differ.
    """
    paired = {split: PAIR in format.parts for split, format in formats.items()}
    if len(set(paired.values())) < 2:
        return
    having, lacking = ([split for split, pair in paired.items() if pair is wanted] for wanted in (True, False))
    raise ConfigError(
        f"the {' and '.join(having)} rows of {source} are pairs with `{PAIR}`, the {' and '.join(lacking)} rows are "
        "not",
        where="data.columns",
        hint=f"give all of them the column, or task.pairs=false, which leaves `{PAIR}` out",
    )


def _both(row: Mapping[str, Any]) -> str:
    return f"{row['text']}\n{row[PAIR]}"
