"""Several labels for a text or a pair of texts: any number of them, or none.

Each label is a yes or no of its own; the loss is the binary cross-entropy, the mean over rows and labels, as
transformers has it. From which probability on a label is given is chosen after training on the validation rows, as the
value with the highest F1 there, and stored with the adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from graftwerk.data.checks import label_names, listed, spellings
from graftwerk.data.fields import Part, labels_part
from graftwerk.data.findings import Issue
from graftwerk.errors import AdapterError, DataError
from graftwerk.tasks.collator import Collator, LabelCollator
from graftwerk.tasks.decoder import Decoder, LabelDecoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.objective import LabelObjective, Objective
from graftwerk.tasks.predictions import LabelPredictions, Predictions
from graftwerk.tasks.sequence import SequenceTask
from graftwerk.tasks.splits import Splits

USUAL = 0.5
"""The threshold where nothing was chosen."""
FEW_ROWS = 5
"""A label that fewer validation rows have takes the threshold of all labels; one of fewer training rows is told."""


class Multilabel(SequenceTask):
    """Multi-label classification."""

    name = "multilabel"
    title = "Multi-label classification"
    fields = ("text", "labels")
    metrics = ("f1_micro", "f1_labels", "average_precision")
    best_metric = "average_precision"
    answer = "labels"
    label_smoothing = False

    separator: str = Field(
        default=",", min_length=1, description="what stands between labels that are one text; not in a JSON list"
    )
    threshold: float | Literal["shared", "label"] = Field(
        default="shared",
        description="probability from which on a label is given; shared: one for all labels, chosen on the validation "
        "rows; label: one for each",
    )
    thresholds: tuple[float, ...] | None = Field(
        default=None, description="one for each label in their order, as they were chosen; goes before `threshold`"
    )

    @property
    def answer_part(self) -> Part:
        return partial(labels_part, separator=self.separator)

    def check_answers(
        self, answers: Mapping[str, Any], labels: Sequence[str] | None, source: str
    ) -> tuple[tuple[str, ...], tuple[Issue, ...]]:
        counts = {split: Counter(name for row in rows for name in row) for split, rows in answers.items()}
        train = counts["train"]
        if labels is not None:
            extra = sorted({name for count in counts.values() for name in count} - set(labels))
            if extra:
                raise AdapterError(
                    f"the rows have labels that the adapter was not trained for: {listed(extra)}",
                    hint="use rows with the adapter's labels, or train a new adapter",
                )
            return tuple(labels), ()
        names = label_names(list(train))
        if not names:
            raise DataError(f"no training row of {source} has a label", hint="check `data.columns.labels`")
        for split, count in counts.items():
            if extra := sorted(set(count) - set(names)):
                raise DataError(
                    f"the {split} rows have labels that no training row has: {listed(extra)}",
                    hint="give both the same labels (spelling and case count), or remove those",
                )
        return names, (*spellings(names), *_findings(train, len(answers["train"])))

    def targets_of(self, rows: Sequence[Row], splits: Splits) -> list[Any]:
        ids = {name: index for index, name in enumerate(splits.labels or ())}
        targets: list[list[int] | None] = []
        for row in rows:
            names = row.get("labels")
            if names is None:
                targets.append(None)
                continue
            if unknown := [name for name in names if name not in ids]:
                raise DataError(
                    f"a row has the label {unknown[0]!r}, which is none of: {', '.join(ids)}",
                    where=f"text: {str(row['text'])[:80]!r}",
                )
            given = {ids[name] for name in names}
            targets.append([int(index in given) for index in range(len(ids))])
        return targets

    def labels_in(self, row: Row) -> Sequence[str]:
        return tuple(row["labels"])

    def target_text(self, target: Any, labels: Sequence[str] | None) -> str | None:
        if target is None or labels is None:
            return None
        return ", ".join(name for name, given in zip(labels, target, strict=True) if given) or "(none)"

    def head_bias(self, examples: Sequence[Example], labels: Sequence[str]) -> list[float]:
        """Return the log-odds of each label among the training rows: before it reads a word, the head knows them."""
        rows = len(examples)
        counts = np.sum([example.target for example in examples], axis=0)
        return [math.log((count + 0.5) / (rows - count + 0.5)) for count in counts.tolist()]

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {**splits.label_settings(), "problem_type": "multi_label_classification"}

    @property
    def collator(self) -> Collator:
        return LabelCollator()

    @property
    def objective(self) -> Objective:
        return LabelObjective()

    @property
    def decoder(self) -> Decoder:
        if self.thresholds is not None:
            return LabelDecoder(self.thresholds)
        return LabelDecoder((USUAL if isinstance(self.threshold, str) else self.threshold,))

    def tuned(self, predictions: Predictions) -> tuple[Self, Predictions]:
        """Return the task with the thresholds that have the highest F1 on the validation rows, and the answers so."""
        assert isinstance(predictions, LabelPredictions)
        if self.thresholds is not None or not isinstance(self.threshold, str) or predictions.targets is None:
            return self, predictions
        scores, targets = predictions.scores, predictions.targets
        shared = best_threshold(scores.ravel(), targets.ravel())
        chosen = [
            best_threshold(scores[:, at], targets[:, at])
            if self.threshold == "label" and targets[:, at].sum() >= FEW_ROWS
            else shared
            for at in range(scores.shape[1])
        ]
        return self.model_copy(update={"thresholds": tuple(chosen)}), replace(predictions, thresholds=np.array(chosen))


def best_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return the threshold with the highest F1: half way between the last score given and the first that is not.

    Args:
        scores: (n,) probabilities.
        targets: (n,) of 0 and 1.
    """
    wanted = int(targets.sum())
    if not wanted:
        return USUAL
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(targets[order])
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    f1 = 2 * hits[ends] / (ends + 1 + wanted)
    last = int(ends[int(f1.argmax())])
    below = float(ordered[last + 1]) if last + 1 < len(ordered) else 0.0
    return (float(ordered[last]) + below) / 2


def _findings(train: Counter[str], rows: int) -> list[Issue]:
    found = []
    if rare := sorted(name for name, count in train.items() if count < FEW_ROWS):
        message = f"{len(rare):,} of {len(train):,} labels have fewer than {FEW_ROWS} training rows"
        found.append(
            Issue("rare-labels", message, 0, example=listed(rare), hint="add rows of these, or leave them out")
        )
    if everywhere := sorted(name for name, count in train.items() if count == rows):
        message = f"every training row has {listed(everywhere)}: there is nothing to tell apart"
        found.append(Issue("constant-labels", message, rows, hint="leave such labels out"))
    return found
