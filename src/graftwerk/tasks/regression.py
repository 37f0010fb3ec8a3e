"""Regression: a text or a pair of texts in, one number out.

The mean squared error is of standardised numbers, (y - mean) / deviation of the training rows, so that a learning rate
suits ratings and prices alike; transformers' own loss is the same without the standardisation. When training ends the
scale goes into the weights of the head (`training.head_start`): what is saved answers in the units of the rows, in
plain transformers as well as here. A head without a bias (most decoders') cannot hold a mean: there, numbers are only
divided by their root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import PrivateAttr

from graftwerk.data.fields import Part, number_part
from graftwerk.data.findings import Issue
from graftwerk.errors import DataError
from graftwerk.tasks.collator import Collator, ScoreCollator
from graftwerk.tasks.decoder import Decoder, ScoreDecoder
from graftwerk.tasks.example import Row
from graftwerk.tasks.objective import Objective, ScoreObjective
from graftwerk.tasks.sequence import SequenceTask
from graftwerk.tasks.splits import Splits

FEW_SCORES = 2
"""So few different numbers are classes rather than scores."""


class Regression(SequenceTask):
    """A number for each text or pair of texts."""

    name = "regression"
    title = "Regression"
    fields = ("text", "score")
    metrics = ("pearson", "spearman", "rmse", "mae")
    best_metric = "loss"
    answer = "score"
    label_smoothing = False

    _scale: tuple[float, float] = PrivateAttr(default=(0.0, 1.0))

    @property
    def answer_part(self) -> Part:
        return number_part

    def check_answers(
        self, answers: Mapping[str, Any], labels: Sequence[str] | None, source: str
    ) -> tuple[tuple[str, ...], tuple[Issue, ...]]:
        names = tuple(labels or ("score",))
        different = set(answers["train"])
        if labels is None and len(different) < 2:
            raise DataError(
                f"all {len(answers['train']):,} training rows of {source} have the score {next(iter(different))};"
                " there is nothing to learn",
                hint="check `data.columns.score` and `data.filter`",
            )
        if labels is not None or len(different) > FEW_SCORES:
            return names, ()
        message = f"the training rows have {len(different)} different scores, as classes have"
        return names, (Issue("few-scores", message, 0, hint="if they are kinds and no amounts: task=classification"),)

    def targets_of(self, rows: Sequence[Row], splits: Splits) -> list[Any]:
        return [row.get("score") for row in rows]

    def labels_in(self, row: Row) -> Sequence[str]:
        return ()

    def target_text(self, target: Any, labels: Sequence[str] | None) -> str | None:
        return None if target is None else f"{target:g}"

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        (name,) = splits.labels or ("score",)
        return {"num_labels": 1, "id2label": {0: name}, "label2id": {name: 0}, "problem_type": "regression"}

    @property
    def collator(self) -> Collator:
        return ScoreCollator()

    @property
    def objective(self) -> Objective:
        return ScoreObjective(*self._scale)

    @property
    def decoder(self) -> Decoder:
        return ScoreDecoder()

    @property
    def scale(self) -> tuple[float, float]:
        """Return the mean and the deviation that a model's output is of; (0, 1) if it is in the units of the rows."""
        return self._scale

    def scaled(self, mean: float, deviation: float) -> Self:
        """Return the task for a model whose output is the number less ``mean``, divided by ``deviation``."""
        bound = self.model_copy()
        bound._scale = (mean, deviation)
        return bound


def scale_of(scores: Sequence[float], *, centred: bool) -> tuple[float, float]:
    """Return the mean and the standard deviation of scores.

    Args:
        scores: Two or more different numbers.
        centred: False to take 0 for the mean, and the root mean square for the deviation.
    """
    mean = math.fsum(scores) / len(scores) if centred else 0.0
    return mean, math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
