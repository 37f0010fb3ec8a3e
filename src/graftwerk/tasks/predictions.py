"""Predictions of a model in the order of the rows: class scores, or likelihoods and generated texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions(ABC):
    """Predictions for rows. The subclasses are `ClassPredictions` and `TextPredictions`.

    Attributes:
        loss: Mean over all targets in nats, or None if a row has no target.
    """

    loss: float | None

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Return True if no score or likelihood is NaN or infinite."""


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """Predictions of classes.

    Attributes:
        scores: (n, C), probabilities that add up to one in each row.
        targets: (n,) class ids, or None if a row has no target.
    """

    scores: NDArray[np.float64]
    targets: NDArray[np.int64] | None

    @property
    def rows(self) -> int:
        return len(self.scores)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.scores).all())


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

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
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
    def finite(self) -> bool:
        return bool(np.isfinite(self.nll).all())
