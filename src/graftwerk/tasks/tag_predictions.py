"""Predictions of a tag for each word, in the order of the rows. Legend: n windows, W words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from graftwerk.tasks.predictions import Floats, Ints, Predictions, alike
from graftwerk.tasks.spans import OUTSIDE, is_bio

NOBODY, UNREAD = -1, -2
"""In rows of words that are filled up to the longest: no word, and a word that the tokenizer gives no token."""


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

    arrays = ("tags", "targets", "certain", "row_ids")
    key = "tags"

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
    def num_targets(self) -> float:
        return float((self.tags >= 0).sum())

    def same_rows(self, other: Predictions) -> bool:
        if not isinstance(other, TagPredictions) or self.labels != other.labels:
            return False
        return alike(self.targets, other.targets) and alike(self.row_ids, other.row_ids)
