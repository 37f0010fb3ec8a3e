"""Predictions of vectors, in the order of the rows. Legend: n rows, D width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graftwerk.tasks.predictions import Floats, Ints, Predictions

RANKED = 256
"""Texts that are compared with all others at a time."""


@dataclass(frozen=True)
class SimilarityPredictions(Predictions):
    """Vectors of length one of texts, or of the two texts of each row.

    Attributes:
        anchors: (n, D), of the first texts.
        others: (n, D), of the second texts, or None for single texts.
        targets: (n,) right scores, or None if rows have none: then the second text is the right one for the first.
    """

    arrays = ("anchors", "others", "targets")
    key = "anchors"

    anchors: NDArray[np.float32]
    others: NDArray[np.float32] | None
    targets: Floats | None

    @property
    def bad_rows(self) -> int:
        both = self.anchors if self.others is None else np.concatenate([self.anchors, self.others], axis=1)
        return int((~np.isfinite(both)).any(axis=1).sum())

    @property
    def measurable(self) -> bool:
        return self.others is not None

    @cached_property
    def values(self) -> Floats:
        """Return the cosine of each row, (n,)."""
        assert self.others is not None
        cosines: Floats = (self.anchors.astype(np.float64) * self.others).sum(axis=1)
        return cosines

    @cached_property
    def ranks(self) -> Ints:
        """Return the rank (n,) of each row's own second text among those of all rows, 1 for the nearest."""
        assert self.others is not None
        own = self.values
        better = np.zeros(self.rows, dtype=np.int64)
        others = self.others.T.astype(np.float64)
        for start in range(0, self.rows, RANKED):
            scores = self.anchors[start : start + RANKED].astype(np.float64) @ others
            # The same text in another batch has the same vector but for rounding.
            better[start : start + RANKED] = (scores > own[start : start + RANKED, None] + 1e-6).sum(axis=1)
        return better + 1

    def answers(self, metric: str, *, cells: bool) -> object:
        return self.values.tobytes() if self.targets is not None else self.ranks.tobytes()
