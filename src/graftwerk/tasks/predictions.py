"""Predictions of a model in the order of the rows: one class for each kind of answer that tasks give.

Metrics, files and comparisons ask a class for what they need (`tensors`, `same_rows`, `answers`), so that a new kind of
answer is one class here and its metrics. Legend: n rows, C classes, L labels, W words, D width of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from graftwerk.tasks.spans import OUTSIDE, is_bio

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NOBODY, UNREAD = -1, -2
"""In rows of words that are filled up to the longest: no word, and a word that the tokenizer gives no token."""


@dataclass(frozen=True)
class Predictions(ABC):
    """Predictions for rows; subclasses hold the answers.

    Attributes:
        loss: Mean over all targets, in nats where it is a likelihood, or None if a row has no target.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that are arrays, each with a row for each row, or piece of one, of the answers."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Those of them that have no row for each row."""
    key: ClassVar[str]
    """Name of the stored tensor that tells this kind from the others."""

    loss: float | None

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def bad_rows(self) -> int:
        """Return the number of rows with a score or likelihood that is NaN or infinite."""

    @property
    def finite(self) -> bool:
        """Return True if no score or likelihood is NaN or infinite."""
        return self.bad_rows == 0

    @property
    @abstractmethod
    def measurable(self) -> bool:
        """Return True if all rows have what answers are compared with."""

    @property
    def num_targets(self) -> float:
        """Return the number of targets that the loss is the mean of."""
        return self.rows

    @abstractmethod
    def same_rows(self, other: Predictions) -> bool:
        """Return True if these are predictions of the same rows, as far as their targets tell."""

    @abstractmethod
    def answers(self, metric: str, *, cells: bool) -> object:
        """Return what a metric sees of the answers, to compare with another run's for equality.

        Args:
            metric: Name of the metric.
            cells: True if it depends on the confusion matrix only.
        """

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names under which they are stored."""
        values = {name: getattr(self, name) for name in self.arrays}
        return {_stored(self, name): np.ascontiguousarray(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, loss: float | None, tensors: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> Self:
        """Return the predictions that `tensors` gave.

        Args:
            loss: Their loss.
            tensors: By the names under which they are stored.
            labels: Label names of the run.
        """
        return cls(loss, **{name: tensors.get(_stored(cls, name)) for name in cls.arrays})


def _stored(kind: Predictions | type[Predictions], name: str) -> str:
    """Return the name of a stored array: the first of a kind names the kind."""
    return kind.key if name == kind.arrays[0] else name


def _alike(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return np.array_equal(np.asarray([] if a is None else a), np.asarray([] if b is None else b))


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """Predictions of classes.

    Attributes:
        scores: (n, C), probabilities that add up to one in each row.
        targets: (n,) class ids, or None if a row has no target.
    """

    arrays: ClassVar[tuple[str, ...]] = ("scores", "targets")
    key: ClassVar[str] = "scores"

    scores: Floats
    targets: Ints | None

    @property
    def rows(self) -> int:
        return len(self.scores)

    @property
    def bad_rows(self) -> int:
        return int((~np.isfinite(self.scores)).any(axis=1).sum()) if self.scores.ndim == 2 else 0

    @property
    def measurable(self) -> bool:
        return self.targets is not None

    def same_rows(self, other: Predictions) -> bool:
        if not isinstance(other, ClassPredictions) or self.scores.shape != other.scores.shape:
            return False
        return _alike(self.targets, other.targets)

    def answers(self, metric: str, *, cells: bool) -> object:
        return (self.scores.argmax(axis=1) if cells else self.scores).tobytes()

    def tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"scores": np.ascontiguousarray(self.scores, dtype=np.float64)}
        if self.targets is not None:
            tensors["targets"] = np.ascontiguousarray(self.targets, dtype=np.int64)
        return tensors


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

    arrays: ClassVar[tuple[str, ...]] = ("nll", "tokens")
    key: ClassVar[str] = "nll"

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
    def rows(self) -> int:
        return len(self.nll)

    @property
    def bad_rows(self) -> int:
        return int((~np.isfinite(self.nll)).sum())

    @property
    def measurable(self) -> bool:
        return True

    def same_rows(self, other: Predictions) -> bool:
        if not isinstance(other, TextPredictions):
            return False
        return self.references == other.references and np.array_equal(self.tokens, other.tokens)

    def answers(self, metric: str, *, cells: bool) -> object:
        return self.nll.tobytes() if self.texts is None or metric == "perplexity" else self.texts

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {
            "nll": np.ascontiguousarray(self.nll, dtype=np.float64),
            "tokens": np.ascontiguousarray(self.tokens, dtype=np.int64),
        }


@dataclass(frozen=True)
class ScorePredictions(Predictions):
    """Predictions of a number.

    Attributes:
        values: (n,), in the units of the rows.
        targets: (n,) right numbers, or None if a row has none.
    """

    arrays: ClassVar[tuple[str, ...]] = ("values", "targets")
    key: ClassVar[str] = "values"

    values: Floats
    targets: Floats | None

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def bad_rows(self) -> int:
        return int((~np.isfinite(self.values)).sum())

    @property
    def measurable(self) -> bool:
        return self.targets is not None

    def same_rows(self, other: Predictions) -> bool:
        return isinstance(other, ScorePredictions) and _alike(self.targets, other.targets)

    def answers(self, metric: str, *, cells: bool) -> object:
        return self.values.tobytes()


@dataclass(frozen=True)
class LabelPredictions(Predictions):
    """Predictions of several labels, any number of which may be right.

    Attributes:
        scores: (n, L) probability of each label.
        targets: (n, L) of 0 and 1, or None if a row has no labels.
        thresholds: (L,) a label is given from this probability on.
    """

    arrays: ClassVar[tuple[str, ...]] = ("scores", "targets", "thresholds")
    whole: ClassVar[tuple[str, ...]] = ("thresholds",)
    key: ClassVar[str] = "label_scores"

    scores: Floats
    targets: Ints | None
    thresholds: Floats

    @property
    def rows(self) -> int:
        return len(self.scores)

    @property
    def bad_rows(self) -> int:
        return int((~np.isfinite(self.scores)).any(axis=1).sum())

    @property
    def measurable(self) -> bool:
        return self.targets is not None

    @cached_property
    def given(self) -> NDArray[np.bool_]:
        """Return which labels are given, (n, L)."""
        chosen: NDArray[np.bool_] = self.scores >= self.thresholds
        return chosen

    def same_rows(self, other: Predictions) -> bool:
        return isinstance(other, LabelPredictions) and _alike(self.targets, other.targets)

    def answers(self, metric: str, *, cells: bool) -> object:
        return (self.scores if metric == "average_precision" else self.given).tobytes()


@dataclass(frozen=True)
class TagPredictions(Predictions):
    """Predictions of a tag for each word. A long row may be several windows, one after another.

    Attributes:
        tags: (n, W) ids, filled up with `NOBODY`; `UNREAD` counts as no entity.
        targets: (n, W) right ids, or None if a row has none.
        certain: (n, W) probability of each tag.
        row_ids: (n,) number of the row that a window is of.
        labels: Names of the tags in the order of their ids.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tags", "targets", "certain", "row_ids")
    key: ClassVar[str] = "tags"

    tags: Ints
    targets: Ints | None
    certain: Floats
    row_ids: Ints
    labels: tuple[str, ...]

    @classmethod
    def from_tensors(cls, loss: float | None, tensors: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> Self:
        known = tensors.get("targets")
        return cls(loss, tensors["tags"], known, tensors["certain"], tensors["row_ids"], tuple(labels))

    @property
    def rows(self) -> int:
        return len(self._bounds)

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Return the first window of each row and the one after its last."""
        new = np.append(True, self.row_ids[1:] != self.row_ids[:-1])[: len(self.row_ids)]
        return list(pairwise([*np.flatnonzero(new).tolist(), len(self.row_ids)]))

    def _joined(self, values: NDArray[Any]) -> list[list[Any]]:
        """Return the values (n, W) of each row's words."""
        there = self.tags != NOBODY
        return [values[start:end][there[start:end]].tolist() for start, end in self._bounds]

    def _names(self, ids: Ints) -> list[tuple[str, ...]]:
        return [tuple(self.labels[tag] if tag >= 0 else OUTSIDE for tag in row) for row in self._joined(ids)]

    @cached_property
    def tag_names(self) -> list[tuple[str, ...]]:
        """Return the tags of each row by name."""
        return self._names(self.tags)

    @cached_property
    def target_names(self) -> list[tuple[str, ...]]:
        """Return the right tags of each row by name."""
        assert self.targets is not None
        return self._names(self.targets)

    @property
    def certainties(self) -> list[list[float]]:
        """Return the probability of each tag of each row."""
        return self._joined(self.certain)

    @property
    def plain(self) -> bool:
        """Return True if a tag is a kind itself, with no letter in front."""
        return not all(map(is_bio, self.labels))

    @property
    def bad_rows(self) -> int:
        return int((~np.isfinite(self.certain)).any(axis=1).sum())

    @property
    def measurable(self) -> bool:
        return self.targets is not None

    @property
    def num_targets(self) -> float:
        return float((self.tags >= 0).sum())

    def same_rows(self, other: Predictions) -> bool:
        if not isinstance(other, TagPredictions) or self.labels != other.labels:
            return False
        return _alike(self.targets, other.targets) and _alike(self.row_ids, other.row_ids)

    def answers(self, metric: str, *, cells: bool) -> object:
        return self.tags.tobytes()
