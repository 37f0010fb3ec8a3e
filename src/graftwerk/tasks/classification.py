"""Text classification: one text in, one of two or more classes out.

Works with every model that transformers can put a sequence classification head on: encoders (BERT family) through their
first or pooled position, decoders through the last position that is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor

from graftwerk.data.checks import check_labels
from graftwerk.data.fields import label_part, text_part
from graftwerk.data.rows import Table
from graftwerk.data.settings import DataSettings, shown
from graftwerk.data.splits_reader import RowFormat, read_splits, read_unanswered
from graftwerk.data.stream import read_stream
from graftwerk.errors import DataError
from graftwerk.tasks.base import Issue, Task
from graftwerk.tasks.collator import ClassCollator, Collator
from graftwerk.tasks.decoder import ClassDecoder, Decoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.example_checks import special_notes, special_words
from graftwerk.tasks.objective import ClassObjective, Objective
from graftwerk.tasks.splits import Splits, splits_of, splits_of_stream
from graftwerk.tasks.tokenization import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READING = RowFormat({"text": text_part, "label": label_part}, key="text", stratify="label", answers=("label",))


class Classification(Task):
    """Single-label classification, binary and multi-class."""

    name: ClassVar[str] = "classification"
    title: ClassVar[str] = "Text classification"
    fields: ClassVar[tuple[str, ...]] = tuple(READING.parts)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1_macro", "f1_weighted", "roc_auc")
    best_metric: ClassVar[str] = "accuracy"
    has_head: ClassVar[bool] = True

    _class_weights: Tensor | None = PrivateAttr(default=None)

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        return READING

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        """Read, check and split the rows; nothing of a model is needed or loaded.

        Args:
            data: Sources and settings of the rows.
            labels: The label names an adapter already has. Rows must use these, and may use fewer.

        Raises:
            ConfigError: no such source, column or split size.
            DataError: unreadable or unusable rows, one class only, classes that differ between splits.
            AdapterError: the rows have classes that ``labels`` has not.
            ResourceError: a source cannot be reached.
        """
        if data.streaming:
            streamed = read_stream(data, self.row_format, self.fields)
            names, said = check_labels(streamed.classes or {}, labels, shown(data.source))
            return splits_of_stream(data, streamed, self.fields, labels=names, findings=said)
        chosen, findings = read_splits(data, self.row_format)
        placed = {split: part.placed() for split, part in chosen.items()}
        names, said = check_labels(
            {split: rows.labels or () for split, rows in placed.items()}, labels, shown(data.source)
        )
        findings += said
        return splits_of(data, chosen, findings, self.fields, labels=names)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Encode rows to token ids and class ids, in order. A row without a `label` gets the target None.

        Args:
            rows: Each with `text`, and with `label` where it is known.
            tokenizer: The model's tokenizer.
            splits: The splits, for their label names.
            max_length: Tokens kept of a row, special tokens included; what is lost is counted in each example.

        Raises:
            DataError: a label that is not in ``splits.labels``.
        """
        ids = {name: index for index, name in enumerate(splits.labels or ())}
        targets: list[int | None] = []
        for row in rows:
            label = row.get("label")
            if label is not None and label not in ids:
                raise DataError(
                    f"a row has the class {label!r}, which is none of: {', '.join(ids)}",
                    where=f"text: {str(row['text'])[:80]!r}",
                )
            targets.append(None if label is None else ids[label])
        encoded = encode_texts([row["text"] for row in rows], tokenizer, max_length)
        special = special_words(tokenizer)
        return [
            Example(inputs, target, truncated, notes=special_notes([row["text"]], special))
            for row, (inputs, truncated), target in zip(rows, encoded, targets, strict=True)
        ]

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        names = splits.labels or ()
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    @property
    def collator(self) -> Collator:
        return ClassCollator()

    @property
    def objective(self) -> Objective:
        return ClassObjective(self._class_weights)

    @property
    def decoder(self) -> Decoder:
        return ClassDecoder()

    def weight_of(self, label: int) -> float:
        """Return the weight of a class in the loss, 1 without class weights."""
        return 1.0 if self._class_weights is None else float(self._class_weights[label])

    def weighted(self, weights: Sequence[float]) -> Self:
        """Return the task with class weights in the loss, for training.

        Args:
            weights: One per class, in the order of their ids.
        """
        bound = self.model_copy()
        bound._class_weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        return bound


def rows_for_prediction(
    source: str,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    *,
    split: str = "train",
) -> tuple[Table, tuple[Issue, ...]]:
    """Rows to predict for: each has `text`, no row needs a label, and none is taken even where the source has one.

    Returns:
        The table (``table.rows[i]["text"]``, ``table.where(i)`` is its file and line), and what was left out.

    Raises:
        ConfigError, DataError, ResourceError: as for reading labelled rows.
    """
    return read_unanswered(source, lambda _: READING, columns, on_bad_row, split=split)
