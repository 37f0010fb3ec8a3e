"""Differences between models that were measured on the same rows, over rows and training seeds.

Two models answer the same held-out rows, so most of what makes a figure uncertain (easy rows, hard rows) is common to
both and drops out of the difference: rows are drawn *together* for all models. A method trained with several seeds is
a sample of its own: seeds are drawn too, together for all methods that have them (they share row order and head
initialisation), so an interval holds both what other rows and what another seed would have done.

Of S seeds, S - 1 are drawn with replacement. Drawing S would understate the variance of the mean by (S - 1)/S, a
third at three seeds; drawing S - 1 is unbiased (Rao and Wu, Resampling inference with complex survey data, 1988).
Rows and seeds drawn independently of each other is the crossed bootstrap of Owen, The pigeonhole bootstrap (2007); it
errs, mildly, on the wide side.

Three seeds say little about how much seeds matter, and a bootstrap does not know that. Where the spread between seeds
is a large part of a variance, the interval is widened from the normal to Student's t with Satterthwaite's degrees of
freedom (1946): the part that rows contribute counts as known, the part that seeds contribute has S - 1. Where rows
dominate, nothing changes.

With many pairs compared at once, one in twenty 95 % intervals would miss by chance. `simultaneous` widens them
together so that *all* of them hold at once with the confidence asked for: the largest studentised deviation over all
pairs, draw by draw, gives one factor for every standard error (Romano and Wolf, 2005, single step). Among many pairs,
some have seeds that agree by luck, and the largest deviation finds them; so no pair's seed variance counts as smaller
than the median over the pairs. An interval without zero and an adjusted p below 1 - confidence are the same event.

In simulated comparisons of seven methods without any difference (500 rows, two to five seeds, a spread between seeds of
one to two points) all 21 intervals held zero in 95 to 99 % of the comparisons; without the two corrections in as few as
66 % (docs/decisions/0007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypedDict

import numpy as np

from graftwerk.errors import DataError
from graftwerk.evaluate.bootstrap import Floats, draw_counts, percentile_interval
from graftwerk.evaluate.metrics import METRICS, Figure, check, point, same_rows, statistic_of
from graftwerk.tasks.predictions import Predictions

Runs = Mapping[int, Predictions]
"""A method's predictions by training seed, all on the same rows."""


class Difference(TypedDict):
    """``a`` minus ``b``: the value, its interval, and the adjusted p of no difference (None where it was not asked
    for).
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    p: float | None


@dataclass(frozen=True)
class Joint:
    """One bootstrap of several methods over common rows and seeds.

    Attributes:
        methods: Names, in the order of the columns.
        means: Point values (M,): the mean over a method's seeds.
        draws: Bootstrap means (R, M), drawn jointly; nan where a draw leaves the metric undefined.
        values: Each method's value by seed.
        metric: Of what.
    """

    methods: tuple[str, ...]
    means: Floats
    draws: Floats
    values: dict[str, dict[int, float]]
    metric: str = "accuracy"

    def figure(self, method: str, confidence: float) -> Figure:
        """A method's mean over seeds with its percentile interval."""
        m = self.methods.index(method)
        values = self.values[method]
        low, high = _percentiles(self.draws[:, m], float(self.means[m]), list(values.values()), confidence)
        # A share of rows lies between 0 and 1 whatever the widening says.
        least, most = METRICS[self.metric].bounds
        figure: Figure = {"value": float(self.means[m]), "low": max(low, least), "high": min(high, most)}
        if len(values) == 1:
            figure["note"] = "one seed: the interval does not hold what another training seed would change"
        return figure

    def simultaneous(self, confidence: float) -> list[Difference]:
        """Every pair of methods, with intervals that all hold together."""
        pairs = list(combinations(range(len(self.methods)), 2))
        if not pairs:
            return []
        a, b = (list(side) for side in zip(*pairs, strict=True))
        value = self.means[a] - self.means[b]
        drawn = self.draws[:, a] - self.draws[:, b]
        drawn = drawn[~np.isnan(drawn).any(axis=1)]
        spread = drawn.std(axis=0, ddof=1)
        # Two methods with the same predictions everywhere have no spread: their interval is [0, 0], and rightly so.
        safe = np.where(spread > 0, spread, 1.0)
        largest = (np.abs(drawn - drawn.mean(axis=0)) / safe).max(axis=1)
        factor = float(np.quantile(largest, confidence))
        own = np.array([_seed_variance(self._by_seed(i, j)) for i, j in pairs])
        seeded = np.maximum(own, np.median(own))
        error = np.where(spread > 0, np.sqrt(spread**2 + seeded - own), 0.0)
        wider = [_widening(seeded[k], len(self._by_seed(i, j)), error[k], factor) for k, (i, j) in enumerate(pairs)]
        error = error * np.array(wider)
        size = np.divide(np.abs(value), error, out=np.zeros_like(value), where=error > 0)
        p = (1 + (largest[:, None] >= size).sum(axis=0)) / (1 + len(largest))
        return [
            {
                "a": self.methods[i],
                "b": self.methods[j],
                "value": float(value[k]),
                "low": float(value[k] - factor * error[k]),
                "high": float(value[k] + factor * error[k]),
                "p": float(p[k]),
            }
            for k, (i, j) in enumerate(pairs)
        ]

    def difference(self, a: str, b: str, confidence: float) -> Difference:
        """One pair with an interval of its own, as if it were the only one."""
        i, j = self.methods.index(a), self.methods.index(b)
        value = float(self.means[i] - self.means[j])
        low, high = _percentiles(self.draws[:, i] - self.draws[:, j], value, self._by_seed(i, j), confidence)
        return {"a": a, "b": b, "value": value, "low": low, "high": high, "p": None}

    def _by_seed(self, i: int, j: int) -> list[float]:
        """The difference at every seed that both have."""
        a, b = self.values[self.methods[i]], self.values[self.methods[j]]
        return [a[seed] - b[seed] for seed in a if seed in b]


def _percentiles(draws: Floats, value: float, by_seed: Sequence[float], confidence: float) -> tuple[float, float]:
    from scipy.special import ndtri

    low, high = percentile_interval(draws, confidence)
    error = float(np.nanstd(draws, ddof=1))
    wider = _widening(_seed_variance(by_seed), len(by_seed), error, float(ndtri((1 + confidence) / 2)))
    return value - (value - low) * wider, value + (high - value) * wider


def _seed_variance(by_seed: Sequence[float]) -> float:
    """What seeds contribute to the variance of the mean over them; 0 where one seed cannot tell."""
    return float(np.var(by_seed, ddof=1)) / len(by_seed) if len(by_seed) > 1 else 0.0


def _widening(seeded: float, seeds: int, error: float, factor: float) -> float:
    """Student's t over the normal quantile `factor`, for a standard error whose part `seeded` comes from so many
    seeds.
    """
    from scipy.special import ndtr, stdtrit

    if seeds < 2 or error <= 0 or seeded <= 0:
        return 1.0
    share = min(seeded / error**2, 1.0)
    return float(stdtrit((seeds - 1) / share**2, ndtr(factor))) / factor


def joint_bootstrap(methods: Mapping[str, Runs], metric: str, *, resamples: int = 2000, seed: int = 0) -> Joint:
    """Draw rows and seeds together for all methods.

    Args:
        methods: By method's name, by seed: predictions on the same rows in the same order. A method may lack seeds (a
            run that failed); its mean is over those it has.
        metric: One of `metrics.METRICS`.
        resamples: Draws.
        seed: Of the draws.
    Raises:
        DataError: rows or targets differ between runs, or the metric is undefined on these rows.
    """
    names = tuple(methods)
    columns = [(m, seed_) for m, name in enumerate(names) for seed_ in methods[name]]
    first = methods[names[columns[0][0]]][columns[0][1]]
    statistics, values = [], dict[str, dict[int, float]]()
    for m, seed_ in columns:
        own = methods[names[m]][seed_]
        check(own)
        if not same_rows(own, first):
            raise DataError(
                f"`{names[m]}` with seed {seed_} was measured on other rows than `{names[columns[0][0]]}`",
                mend="run the comparison again in an empty folder, so that all runs share their held-out rows",
            )
        value = point(metric, own)
        if value is None:
            raise DataError(f"`{metric}` is undefined on these rows: a class is absent", mend="hold out more rows")
        values.setdefault(names[m], {})[seed_] = value
        statistics.append(statistic_of(metric, own))
    rng = np.random.default_rng(seed)
    seeds = sorted({seed_ for _, seed_ in columns})
    picked = _draw_seeds(len(seeds), resamples, rng)
    # (S, runs) x (runs, M): which run counts for which method, whenever its seed is drawn.
    belongs = np.zeros((len(columns), len(names)))
    belongs[np.arange(len(columns)), [m for m, _ in columns]] = 1
    share = picked[:, [seeds.index(seed_) for _, seed_ in columns]]
    draws = np.empty((resamples, len(names)))
    start = 0
    for weights in draw_counts(np.ones(first.rows, dtype=np.int64), resamples, rng):
        rows = slice(start, start + len(weights))
        by_run = np.stack([f(weights) for f in statistics], axis=1) * share[rows]
        drawn = share[rows] @ belongs
        draws[rows] = np.divide(by_run @ belongs, drawn, out=np.full_like(drawn, np.nan), where=drawn > 0)
        start += len(weights)
    means = np.array([np.mean(list(values[name].values())) for name in names])
    return Joint(names, means, draws, values, metric)


def _draw_seeds(seeds: int, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each seed is drawn: (R, S), S - 1 draws each; a single seed stands still."""
    if seeds == 1:
        return np.ones((resamples, 1))
    return rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)


def paired_difference(
    a: Predictions | Sequence[Predictions] | Runs,
    b: Predictions | Sequence[Predictions] | Runs,
    *,
    metric: str = "accuracy",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """How much better `a` is than `b` on the same rows, with its interval.

    Each is one model's predictions, or those of several training seeds (a sequence in the order of the seeds, or a
    mapping by seed): then the interval is over rows and seeds, and the value is the difference of the means.

    Raises:
        DataError: the two were not measured on the same rows.
    """
    joint = joint_bootstrap({"a": _runs(a), "b": _runs(b)}, metric, resamples=resamples, seed=seed)
    return joint.difference("a", "b", confidence)


def _runs(predictions: Predictions | Sequence[Predictions] | Runs) -> Runs:
    if isinstance(predictions, Predictions):
        return {0: predictions}
    if isinstance(predictions, Mapping):
        return predictions
    return dict(enumerate(predictions))
