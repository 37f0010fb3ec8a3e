"""Predictions of a model in the order of the rows: one class for each kind of answer that tasks give.

Metrics, files and comparisons ask a class for what they need (`tensors`, `same_rows`, `answers`), so that a new kind of
answer is one class here and its metrics. Legend: n rows, C classes, L labels, W words, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Predictions for rows; subclasses hold the answers.

    Attributes:
        loss: Mean over all targets, in nats where it is a likelihood, or None if a row has no target.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that are arrays, each with a row for each row, or piece of one, of the answers."""
    optional: ClassVar[tuple[str, ...]] = ("targets", "others")
    """Those of them that may be None."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Those of them that have no row for each row."""
    key: ClassVar[str]
    """Name of the stored tensor that tells this kind from the others."""

    loss: float | None

    @property
    def _first(self) -> NDArray[Any]:
        array: NDArray[Any] = getattr(self, self.arrays[0])
        return array

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self._first)

    @property
    def bad_rows(self) -> int:
        """Return the number of rows with a score or likelihood that is NaN or infinite."""
        bad = ~np.isfinite(self._first)
        return int(bad.any(axis=tuple(range(1, bad.ndim))).sum())

    @property
    def finite(self) -> bool:
        """Return True if no score or likelihood is NaN or infinite."""
        return self.bad_rows == 0

    @property
    def measurable(self) -> bool:
        """Return True if all rows have what answers are compared with."""
        return getattr(self, "targets", None) is not None

    @property
    def num_targets(self) -> float:
        """Return the number of targets that the loss is the mean of."""
        return self.rows

    def same_rows(self, other: Predictions) -> bool:
        """Return True if these are predictions of the same rows, as far as their targets tell."""
        targets, others = (getattr(each, "targets", None) for each in (self, other))
        return type(other) is type(self) and self.rows == other.rows and alike(targets, others)

    def answers(self, metric: str, *, cells: bool) -> object:
        """Return what a metric sees of the answers, to compare with another run's for equality.

        Args:
            metric: Name of the metric.
            cells: True if it depends on the confusion matrix only.
        """
        return self._first.tobytes()

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names under which they are stored."""
        values = {name: getattr(self, name) for name in self.arrays}
        return {_stored(self, name): np.ascontiguousarray(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, loss: float | None, tensors: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> Self:
        """Return the predictions that `tensors` gave.

        Raises:
            KeyError: A tensor is missing.
        """
        stored = {name: _stored(cls, name) for name in cls.arrays}
        return cls(
            loss, **{name: tensors.get(key) if name in cls.optional else tensors[key] for name, key in stored.items()}
        )


def _stored(kind: Predictions | type[Predictions], name: str) -> str:
    """Return the name of a stored array: the first of a kind names the kind."""
    return kind.key if name == kind.arrays[0] else name


def alike(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    """Return True if two arrays, or None, have the same values."""
    return np.array_equal(np.asarray([] if a is None else a), np.asarray([] if b is None else b))


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """Predictions of classes.

    Attributes:
        scores: (n, C), probabilities that add up to one in each row.
        targets: (n,) class ids, or None if a row has no target.
    """

    arrays = ("scores", "targets")
    key = "scores"

    scores: Floats
    targets: Ints | None

    def same_rows(self, other: Predictions) -> bool:
        return super().same_rows(other) and self.scores.shape[1:] == other._first.shape[1:]

    def answers(self, metric: str, *, cells: bool) -> object:
        return (self.scores.argmax(axis=1) if cells else self.scores).tobytes()


@dataclass(frozen=True)
class TextPredictions(Predictions):
    """Likelihoods of the reference answers under a language model, and the texts it generated.

    Attributes:
        nll: (n,) negative log-likelihood of each row's trained tokens, summed, in nats.
        tokens: (n,) number of trained tokens of each row.
        texts: The text generated for each row, or None if nothing was generated.
        references: The reference answer of each row, or None if the task has none (plain text) or a row has none.
        sources: The source of each row, for metrics and tables that show it, or None as for `references`.
        sets: For rows of several data sets, the name of each row's set, else None.
        languages: Expected language of each row's answer (ISO code, or "" if unknown), or None if all are unknown.
    """

    arrays = ("nll", "tokens")
    key = "nll"

    nll: Floats
    tokens: Ints
    texts: tuple[str, ...] | None = None
    references: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    sets: tuple[str, ...] | None = None
    languages: tuple[str, ...] | None = None

    def of_set(self, name: str) -> TextPredictions:
        """Return the predictions for the rows of one set."""
        kept = [row for row, other in enumerate(self.sets or ()) if other == name]

        def some(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[row] for row in kept)

        nll, tokens = self.nll[kept], self.tokens[kept]
        loss = float(nll.sum() / tokens.sum()) if tokens.sum() else None
        columns = {name: some(getattr(self, name)) for name in ("texts", "references", "sources", "languages")}
        return TextPredictions(loss, nll, tokens, **columns)

    @property
    def measurable(self) -> bool:
        return True

    def same_rows(self, other: Predictions) -> bool:
        if not isinstance(other, TextPredictions):
            return False
        return self.references == other.references and np.array_equal(self.tokens, other.tokens)

    def answers(self, metric: str, *, cells: bool) -> object:
        return self.nll.tobytes() if self.texts is None or metric == "perplexity" else self.texts


@dataclass(frozen=True)
class ScorePredictions(Predictions):
    """Predictions of a number.

    Attributes:
        values: (n,), in the units of the rows.
        targets: (n,) right numbers, or None if a row has none.
    """

    arrays = ("values", "targets")
    key = "values"

    values: Floats
    targets: Floats | None


@dataclass(frozen=True)
class LabelPredictions(Predictions):
    """Predictions of several labels, any number of which may be right.

    Attributes:
        scores: (n, L) probability of each label.
        targets: (n, L) of 0 and 1, or None if a row has no labels.
        thresholds: (L,) a label is given from this probability on.
    """

    arrays = ("scores", "targets", "thresholds")
    whole = ("thresholds",)
    key = "label_scores"

    scores: Floats
    targets: Ints | None
    thresholds: Floats

    @cached_property
    def given(self) -> NDArray[np.bool_]:
        """Return which labels are given, (n, L)."""
        chosen: NDArray[np.bool_] = self.scores >= self.thresholds
        return chosen

    def answers(self, metric: str, *, cells: bool) -> object:
        return (self.scores if metric == "average_precision" else self.given).tobytes()
