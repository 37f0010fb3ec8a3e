"""Resampling, vectorised: draws of rows as weights, and intervals of statistics that are functions of weights.

A bootstrap draw of n rows is a vector of counts that sum to n. Every metric is a function of such counts, so a
thousand draws are one (draws, kinds) matrix and a metric over all of them is a matrix product or a cumulative sum,
never a Python loop over draws. Rows that a metric cannot tell apart are one *kind*: accuracy and F1 see only (target,
predicted), so their draws are multinomial counts of the cells of the confusion matrix, which has the same law as
drawing the rows and is as cheap for a million rows as for a hundred.

Source of the scheme: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
Legend: R draws, K kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Weights (R, K) in, one value a draw (R,) out; nan where the draw leaves the metric undefined."""

BLOCK = 4_000_000
"""Weights held at once: 32 MB."""


def kinds(*columns: NDArray[Any]) -> tuple[tuple[NDArray[Any], ...], Ints]:
    """Return the K distinct rows of integer columns (n,) as columns (K,), and the number of each (K,)."""
    distinct, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    return tuple(distinct.T), counts.astype(np.int64)


def draw_counts(counts: Ints, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield bootstrap counts in blocks (<= R, K), R draws in all.

    Each draw sums to the number of rows.
    """
    n, size = int(counts.sum()), len(counts)
    single = size == n
    block = max(1, BLOCK // max(size, 1))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        if single:
            # Drawing n rows out of n one by one is several times faster than numpy's multinomial over n cells.
            drawn = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
            yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        else:
            yield rng.multinomial(n, counts / n, size=rows).astype(np.float64)


def resample(counts: Ints, statistics: Sequence[Statistic], resamples: int, rng: np.random.Generator) -> Floats:
    """Return each statistic over the same R resamples, (len(statistics), R)."""
    blocks = [np.stack([f(weights) for f in statistics]) for weights in draw_counts(counts, resamples, rng)]
    return np.concatenate(blocks, axis=1)


def share(part: Floats, whole: Floats, undefined: float = 0.0) -> Floats:
    """Return a part of a whole, any shape, and ``undefined`` where the whole is zero."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    result: Floats = np.divide(part, whole, out=np.full_like(part, undefined), where=whole > 0)
    return result


def mean_over_rows(values: Floats) -> Statistic:
    """Return the mean of values (K,) over the rows drawn; nan if none was, which happens to the rows of a small set."""
    return lambda weights: share(weights @ values, weights.sum(axis=1), np.nan)


def percentile_interval(draws: Floats, confidence: float) -> tuple[float, float]:
    """Return the bounds of the central `confidence` share of the resamples, nan left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)
