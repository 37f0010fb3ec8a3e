"""What a model said about rows, in the order of the rows: class scores, or likelihoods and generated texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions(ABC):
    """Final subclasses: `ClassPredictions`, `TextPredictions`.

    Attributes:
        loss: Mean over all targets, in nats; None where a row has no target.
    """

    loss: float | None

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows there are."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether every number in it is one."""


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """``scores`` (n, C), softmaxed; ``targets`` (n,) class ids, None where a row has none."""

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
    """What a language model thinks of the right answers, and the answers of its own.

    Attributes:
        nll: (n,) Negative log-likelihood of each row's trained tokens, summed, in nats.
        tokens: (n,) How many trained tokens each row has.
        texts: What was generated for each row; None where nothing was asked to be.
        references: The right answer of each row; None where a task has none (plain text), or a row has none.
        sources: What each row was answered from, for metrics and tables that show it.
        sets: For rows of several data sets, the name of each row's set.
        languages: The language (ISO code, or nothing) that each row's answer is to be in; None: of no row known.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    texts: tuple[str, ...] | None = None
    references: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    sets: tuple[str, ...] | None = None
    languages: tuple[str, ...] | None = None

    def of_set(self, name: str) -> TextPredictions:
        """Those of one set's rows."""
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
