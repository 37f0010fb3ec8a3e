"""Sampling rows from several data sets: shares by size, weight and temperature, and the draws of an epoch.

With n_i rows and weight w_i, set i has the share p_i proportional to w_i * n_i ** (1 / T): as the rows stand at T = 1,
all sets alike at T = infinity (Arivazhagan et al., 2019, arXiv:1907.05019, with T = 5 for translation; the weights are
ours). An epoch has as many rows as all sets together. Of these each set gets its share to the row, by largest
remainders, and draws without replacement: a set that gives fewer rows than it has resumes in the next epoch where it
stopped, one that gives more starts over.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """Return the share of each set; they add up to one.

    Args:
        sizes: Rows of each set; an empty set has the share 0.
        weights: Weight of each set.
        temperature: 1 or more; `math.inf` gives all sets the same share, but for their weights.
    """
    scaled = [
        weight * size ** (0.0 if math.isinf(temperature) else 1 / temperature) if size else 0.0
        for size, weight in zip(sizes, weights, strict=True)
    ]
    total = math.fsum(scaled)
    return [value / total for value in scaled]


def quotas(wanted: Sequence[float], rows: int) -> list[int]:
    """Return whole numbers that add up to ``rows``, none further than one from its share (largest remainders)."""
    exact = [share * rows for share in wanted]
    given = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: (given[at] - exact[at], at))
    for at in by_remainder[: rows - sum(given)]:
        given[at] += 1
    return given


class Sampler:
    """The rows of each epoch: a pure function of seed and epoch.

    Args:
        sets: For each row, the number of its set.
        weights: One a set.
        temperature: As for `shares`.
    """

    def __init__(self, sets: Sequence[int], weights: Sequence[float], temperature: float, seed: int) -> None:
        self.members: list[list[int]] = [[] for _ in weights]
        for row, number in enumerate(sets):
            self.members[number].append(row)
        self.shares = shares([len(rows) for rows in self.members], weights, temperature)
        self.quotas = quotas(self.shares, len(sets))
        self.seed = seed

    def __call__(self, epoch: int) -> list[int]:
        """Return the indices of rows, set by set; as many in every epoch."""
        return [
            row
            for number, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True))
            for row in self._drawn(number, members, quota, epoch)
        ]

    def _drawn(self, number: int, members: list[int], quota: int, epoch: int) -> list[int]:
        if quota == len(members):
            return members  # every row once: their order is drawn elsewhere
        start = epoch * quota
        drawn: list[int] = []
        while len(drawn) < quota:
            turn, place = divmod(start + len(drawn), len(members))
            order = list(members)
            random.Random(f"set {self.seed} {number} {turn}").shuffle(order)
            drawn += order[place : place + quota - len(drawn)]
        return drawn
