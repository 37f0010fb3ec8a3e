"""Differences between methods that were measured on the same rows, over rows and training seeds.

Two models answer the same held-out rows, so most of what makes a metric uncertain (easy rows, hard rows) is common to
both and drops out of the difference: rows are drawn *together* for all runs. A method trained with several seeds is a
sample of its own, so that an interval holds both what other rows and what another seed would have done. With one seed
each, intervals hold rows alone: they compare the trained models at hand, and no method is called better.

With many pairs compared at once, one in twenty 95 % intervals would miss by chance. `Joint.simultaneous` gives
intervals that *all* hold at once with the confidence asked for (`simultaneous.py` has the procedure and its sources,
docs/decisions/0016 how often it misses).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NotRequired, TypedDict

import numpy as np

from graftwerk.errors import DataError
from graftwerk.evaluation.bootstrap import Floats, Ints, draw_counts
from graftwerk.evaluation.metrics import METRICS, check, point, row_effect, statistic_of
from graftwerk.evaluation.row_interval import MetricValue, enough_draws, interval_over_rows
from graftwerk.evaluation.simultaneous import Components, Pairs, components, probability_above, student
from graftwerk.tasks.predictions import Predictions

Runs = Mapping[int, Predictions]
"""A method's predictions by training seed, all on the same rows."""

ONE_SEED = "these intervals compare the models at hand; another training seed may reverse them"


class Difference(TypedDict):
    """``a`` minus ``b``: the value, its interval, and the p of no difference, adjusted if there are several pairs.

    ``p_larger`` is the probability that the true difference is above zero, of this pair alone: Student's law around the
    measured value, as if nothing had been known before. ``over_seeds`` is False if every method has one seed: interval
    and probability then hold other rows alone. Absent means True.
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    p: float | None
    p_larger: NotRequired[float]
    over_seeds: NotRequired[bool]


@dataclass(frozen=True)
class JointBootstrap:
    """One bootstrap of several methods over common rows, every run kept.

    Attributes:
        methods: Names, M of them.
        values: Each method's value by seed, N in all.
        draws: Bootstrap values of the runs (R, N) in the order of ``values``; nan where a draw leaves the metric
            undefined.
        effect: What one wrong row changes in the metric, as `metrics.row_effect` says.
        alike: Pairs of methods (their places) that give the same answers on every row.
        metric: Of what.
        seed: Of the simulation behind `simultaneous`.
    """

    methods: tuple[str, ...]
    values: dict[str, dict[int, float]]
    draws: Floats
    effect: float = 0.0
    alike: frozenset[tuple[int, int]] = frozenset()
    metric: str = "accuracy"
    seed: int = 0
    limits: tuple[float, float] | None = None
    """Least and greatest value that there can be, or None for those of the metric."""

    @property
    def _bounds(self) -> tuple[float, float]:
        return METRICS[self.metric].bounds if self.limits is None else self.limits

    @cached_property
    def means(self) -> Floats:
        """Return each method's mean over its seeds, (M,)."""
        return np.array([np.mean(list(self.values[name].values())) for name in self.methods])

    @cached_property
    def _owner(self) -> Ints:
        """Return the index of each run's method, (N,)."""
        return np.repeat(np.arange(len(self.methods)), [len(self.values[name]) for name in self.methods])

    @cached_property
    def parts(self) -> Components:
        """The variance components.

        Raises:
            DataError: most draws of these rows leave the metric undefined.
        """
        defined = self.draws[~np.isnan(self.draws).any(axis=1)]
        if not enough_draws(len(defined), len(self.draws)):
            lacking = f"{len(self.draws) - len(defined)} of {len(self.draws)} draws of these rows lack a class"
            raise DataError(
                f"`{self.metric}` has no intervals: {lacking}",
                hint="hold out more rows, or decide by another metric: metric=accuracy",
            )
        values = np.array([value for name in self.methods for value in self.values[name].values()])
        return components(defined, values, self._owner, self.effect)

    @property
    def over_seeds(self) -> bool:
        """Return True if any method has more than one seed, so that intervals include the variance over seeds."""
        return any(len(values) > 1 for values in self.values.values())

    def figure(self, method: str, confidence: float) -> MetricValue:
        """Return a method's mean over its seeds with an interval of its own."""
        m = self.methods.index(method)
        value = float(self.means[m])
        draws = self.draws[:, self._owner == m].mean(axis=1)
        figure = interval_over_rows(value, draws, confidence, self._bounds, self.effect)
        if not self.over_seeds:
            figure["note"] = f"one seed: {ONE_SEED}"
        if figure["low"] is None or figure["high"] is None:
            return figure
        wider, besides = self._widening(m, confidence)
        low = value - np.hypot(wider * (value - figure["low"]), besides)
        high = value + np.hypot(wider * (figure["high"] - value), besides)
        # A share of rows lies between 0 and 1 whatever the widening says.
        least, most = self._bounds
        return {**figure, "low": max(float(low), least), "high": min(float(high), most)}

    def _widening(self, m: int, confidence: float) -> tuple[float, float]:
        """Return how seeds widen a mean's interval over rows: a factor on its sides, and a half-width to add.

        The half-width is 0 unless the rows have no variance at all.
        """
        if not self.over_seeds:
            return 1.0, 0.0
        per_seed, rows = 1 / self.parts.seeds[m : m + 1], float(self.parts.rows[m, m])
        squared = np.maximum(rows + per_seed * self.parts.seed_variance, rows / 2)
        quantile = student(confidence, self.parts.degrees(squared, per_seed))
        if rows > 0:
            return float(np.sqrt(squared[0] / rows)) * quantile / student(confidence, np.inf), 0.0
        return 1.0, quantile * float(np.sqrt(squared[0]))

    @cached_property
    def pairs(self) -> Pairs:
        """Return the standard errors of all pairs of methods."""
        return Pairs(self.parts, self.alike, self.seed)

    def simultaneous(self, confidence: float) -> list[Difference]:
        """Return the difference of every pair of methods, with intervals that all hold together.

        Raises:
            DataError: most draws of these rows leave the metric undefined.
        """
        places = list(combinations(self.methods, 2))
        if not places:
            return []
        i, j = self.pairs.sides
        p = self.pairs.adjusted_p(self.means[i] - self.means[j])
        factor = self.pairs.factor(confidence)
        return [self._difference(a, b, factor, float(p[k])) for k, (a, b) in enumerate(places)]

    def grouped(
        self, groups: Mapping[str, Sequence[str]], confidence: float
    ) -> tuple[list[MetricValue], list[Difference]]:
        """Return the mean of each group of methods, and the differences of all pairs of groups.

        Args:
            groups: Names of the methods by group; no method is in two of them.
            confidence: Level of the intervals; those of the differences hold together.

        Returns:
            The means with intervals of their own, and the differences.
        """
        weights = np.array([[(name in names) / len(names) for name in self.methods] for names in groups.values()])
        parts, means = self.parts.combined(weights), weights @ self.means
        least, most = self._bounds
        figures: list[MetricValue] = []
        for g, value in enumerate(means.tolist()):
            per_seed, rows = 1 / parts.seeds[g : g + 1], float(parts.rows[g, g])
            squared = np.maximum(rows + per_seed * parts.seed_variance, rows / 2)
            half = student(confidence, parts.degrees(squared, per_seed)) * math.sqrt(float(squared[0]))
            figures.append({"value": value, "low": max(value - half, least), "high": min(value + half, most)})
        pairs = Pairs(parts, frozenset(), self.seed)
        i, j = pairs.sides
        gaps, half_widths = means[i] - means[j], pairs.factor(confidence) * pairs.errors
        names, p = list(groups), pairs.adjusted_p(gaps)
        differences: list[Difference] = [
            {
                "a": names[a], "b": names[b], "value": float(gaps[k]), "low": float(gaps[k] - half_widths[k]),
                "high": float(gaps[k] + half_widths[k]), "p": float(p[k]),
                "p_larger": probability_above(0.0, float(gaps[k]), float(pairs.errors[k]), pairs.df),
                "over_seeds": self.over_seeds,
            }
            for k, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True))
        ]  # fmt: skip
        return figures, differences

    def difference(self, a: str, b: str, confidence: float) -> Difference:
        """Return one pair with an interval of its own, as if it were the only one."""
        return self._difference(a, b, student(confidence, self.pairs.df), None)

    def _difference(self, a: str, b: str, factor: float, p: float | None) -> Difference:
        i, j = self.methods.index(a), self.methods.index(b)
        value = error = 0.0
        if i != j:
            place = list(combinations(range(len(self.methods)), 2)).index((min(i, j), max(i, j)))
            value, error = float(self.means[i] - self.means[j]), float(self.pairs.errors[place])
        half, larger = factor * error, probability_above(0.0, value, error, self.pairs.df)
        found: Difference = {
            "a": a, "b": b, "value": value, "low": value - half, "high": value + half, "p": p, "p_larger": larger,
        }  # fmt: skip
        return found if self.over_seeds else {**found, "over_seeds": False}


def joint_bootstrap(
    methods: Mapping[str, Runs], metric: str, *, resamples: int = 2000, seed: int = 0
) -> JointBootstrap:
    """Draw rows together for all runs of all methods.

    Args:
        methods: By method's name, by seed: predictions on the same rows in the same order. A method may lack seeds (a
            run that failed); its mean is over those it has.
        metric: One of `metrics.METRICS`.
        resamples: Draws.
        seed: Of the draws.

    Raises:
        DataError: rows or targets differ between runs, or the metric is undefined on these rows.
    """
    runs = [(name, seed_, own) for name, by_seed in methods.items() for seed_, own in by_seed.items()]
    first_name, _, first = runs[0]
    statistics, values = [], dict[str, dict[int, float]]()
    for name, seed_, own in runs:
        check(own)
        if not own.same_rows(first):
            raise DataError(
                f"`{name}` with seed {seed_} was measured on other rows than `{first_name}`",
                hint="run the comparison again in an empty folder, so that all runs share their held-out rows",
            )
        value = point(metric, own)
        if value is None:
            raise DataError(f"`{metric}` is undefined on these rows: a class is absent", hint="hold out more rows")
        values.setdefault(name, {})[seed_] = value
        statistics.append(statistic_of(metric, own))
    rng = np.random.default_rng(seed)
    blocks = [
        np.stack([statistic(weights) for statistic in statistics], axis=1)
        for weights in draw_counts(np.ones(first.rows, dtype=np.int64), resamples, rng)
    ]
    answers = [
        Counter(own.answers(metric, cells=METRICS[metric].cells) for own in by_seed.values())
        for by_seed in methods.values()
    ]
    alike = frozenset(pair for pair in combinations(range(len(answers)), 2) if answers[pair[0]] == answers[pair[1]])
    return JointBootstrap(
        tuple(methods), values, np.concatenate(blocks), row_effect(metric, first), alike, metric, seed
    )


def paired_difference(
    a: Predictions | Sequence[Predictions] | Runs,
    b: Predictions | Sequence[Predictions] | Runs,
    *,
    metric: str = "accuracy",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Return how much better `a` is than `b` on the same rows, with its interval.

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
