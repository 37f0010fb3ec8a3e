"""Decoding: the outputs kept of each row become predictions, and predictions become answers for people."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwerk.tasks.example import Example
from graftwerk.tasks.predictions import (
    ClassPredictions,
    LabelPredictions,
    Predictions,
    ScorePredictions,
    TextPredictions,
)


class Decoder(ABC):
    """Turn outputs into predictions, and predictions into answers."""

    @abstractmethod
    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> Predictions:
        """Join the outputs of all rows.

        Args:
            outputs: `Objective.per_row_outputs` of each row, (1, width), in the order of the examples.
            examples: The rows.
            loss: Mean over all targets in nats, or None if a row has no target.
            texts: The text generated for each row, or None if nothing was generated.
        """

    @abstractmethod
    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return the answer of each row as `predict` gives it: ``label`` and ``scores``, or ``output``.

        Args:
            predictions: The result of `predictions`.
            labels: Names of the classes in the order of their ids, or None if they have no names.
        """


@dataclass(frozen=True)
class ClassDecoder(Decoder):
    """Class scores from logits."""

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> ClassPredictions:
        """Return the softmax over the C classes of logits (1, C), in float64 so that a row's scores add up to one.

        Scores are (n, C), and targets (n,) if every row has one.
        """
        logits = torch.cat(list(outputs)) if len(outputs) else torch.zeros(0, 0, device="cpu")  # (n, C)
        scores = logits.double().softmax(-1).numpy()
        return ClassPredictions(loss, scores, known_targets(examples, np.int64))

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, ClassPredictions)
        names = labels or [str(index) for index in range(predictions.scores.shape[1])]
        return [
            {
                "label": names[int(scores.argmax())],
                "scores": {name: float(score) for name, score in zip(names, scores, strict=True)},
            }
            for scores in predictions.scores
        ]


@dataclass(frozen=True)
class ScoreDecoder(Decoder):
    """Numbers from numbers."""

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> ScorePredictions:
        values = torch.cat(list(outputs))[:, 0].double().numpy() if len(outputs) else np.zeros(0)  # (n,)
        return ScorePredictions(loss, values, known_targets(examples, np.float64))

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, ScorePredictions)
        return [{"score": float(value)} for value in predictions.values]


@dataclass(frozen=True)
class LabelDecoder(Decoder):
    """Probabilities of labels from logits, and the labels that are given.

    Attributes:
        thresholds: A label is given from this probability on: one for each label, or one for all.
    """

    thresholds: tuple[float, ...]

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> LabelPredictions:
        """Return the logistic function of the logits, each (1, L), in float64."""
        logits = (
            torch.cat(list(outputs)) if len(outputs) else torch.zeros(0, len(self.thresholds), device="cpu")
        )  # (n, L)
        scores = logits.double().sigmoid().numpy()
        thresholds = np.broadcast_to(np.array(self.thresholds), scores.shape[1:]).copy()
        return LabelPredictions(loss, scores, known_targets(examples, np.int64), thresholds)

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, LabelPredictions)
        names = labels or [str(index) for index in range(predictions.scores.shape[1])]
        return [
            {
                "labels": [name for name, chosen in zip(names, row, strict=True) if chosen],
                "scores": {name: float(score) for name, score in zip(names, scores, strict=True)},
            }
            for row, scores in zip(predictions.given, predictions.scores, strict=True)
        ]


def known_targets(examples: Sequence[Example], dtype: type[Any]) -> np.ndarray | None:
    """Return the targets of the examples, (n, ...), or None if there are none, or one is unknown."""
    targets = [example.target for example in examples]
    return np.asarray(targets, dtype=dtype) if targets and all(target is not None for target in targets) else None


class TextDecoder(Decoder):
    """Likelihoods and generated texts; subclasses know the texts of a row."""

    def reference(self, example: Example) -> str | None:
        """Return the right answer that a generated one is compared with, or None if there is none."""
        return None

    @abstractmethod
    def source(self, example: Example) -> str | None:
        """Return the text that is answered, as people read it in a table, or None if the row is not known."""

    def language(self, example: Example) -> str | None:
        """Return the ISO code of the answer's language, for metrics that look for words, or None if not known."""
        return None

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> TextPredictions:
        joined = torch.cat(list(outputs)).numpy() if len(outputs) else np.zeros((0, 2))  # (n, 2)
        languages = tuple(self.language(example) or "" for example in examples)
        return TextPredictions(
            loss,
            joined[:, 0],
            joined[:, 1].astype(np.int64),
            texts=None if texts is None else tuple(texts),
            references=_all_known([self.reference(example) for example in examples]),
            sources=_all_known([self.source(example) for example in examples]),
            languages=languages if any(languages) else None,
        )

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, TextPredictions)
        return [{"output": text} for text in predictions.texts or ()]


def _all_known(values: Sequence[str | None]) -> tuple[str, ...] | None:
    return tuple(map(str, values)) if values and all(value is not None for value in values) else None
