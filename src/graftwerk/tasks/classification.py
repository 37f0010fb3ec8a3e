"""Text classification: a text or a pair of texts in, one of two or more classes out.

Works with every model that transformers can put a sequence classification head on: encoders (BERT family) through their
first or pooled position, decoders through the last position that is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor

from graftwerk.data.checks import check_labels
from graftwerk.data.fields import Part, label_part
from graftwerk.data.splits_reader import RowFormat
from graftwerk.errors import DataError
from graftwerk.tasks.base import Issue
from graftwerk.tasks.collator import ClassCollator, Collator
from graftwerk.tasks.decoder import ClassDecoder, Decoder
from graftwerk.tasks.example import Row
from graftwerk.tasks.objective import ClassObjective, Objective
from graftwerk.tasks.sequence import SequenceTask
from graftwerk.tasks.splits import Splits


class Classification(SequenceTask):
    """Single-label classification, binary and multi-class, of texts or pairs of texts."""

    name = "classification"
    title = "Text classification"
    fields = ("text", "label")
    metrics = ("accuracy", "f1_macro", "f1_weighted", "roc_auc")
    best_metric = "accuracy"
    answer = "label"

    _class_weights: Tensor | None = PrivateAttr(default=None)

    @property
    def answer_part(self) -> Part:
        return label_part

    def _labelled(self, format: RowFormat) -> RowFormat:
        return replace(super()._labelled(format), stratify="label")

    def check_answers(
        self, answers: Mapping[str, Any], labels: Sequence[str] | None, source: str
    ) -> tuple[tuple[str, ...], tuple[Issue, ...]]:
        return check_labels(answers, labels, source)

    def targets_of(self, rows: Sequence[Row], splits: Splits) -> list[Any]:
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
        return targets

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {**splits.label_settings(), "problem_type": "single_label_classification"}

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
        """Return the task with class weights in the loss, for training."""
        bound = self.model_copy()
        bound._class_weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        return bound
