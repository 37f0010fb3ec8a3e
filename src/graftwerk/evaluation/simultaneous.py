"""Simultaneous confidence intervals for all pairs of M methods with S_m training seeds each, measured on common rows.

The model: a run's value is its method's true value, plus what these rows do to it (covariances V, since all runs answer
the same rows), plus what its seed does to it (variance s2, the same for every method; seeds are nested in methods).

    V      covariance over bootstrap draws of the rows, of each method's mean over its seeds      (M, M)
    MS     mean square between the seeds of a method, pooled over the methods, nu = sum (S_m - 1) degrees of freedom
    w      the part of MS that rows explain (two runs of a method differ on rows by chance)
    s2     MS - w, not below -w/2: an estimate that is never negative is biased upwards, and power pays for it
    se2    V_ii + V_jj - 2 V_ij + (1/S_i + 1/S_j) s2, not below half of the part that rows have in it
    df     nu / share^1.25, where share is the part of se2 that MS has, averaged over the pairs. Satterthwaite (1946)
           squares the share, which is too narrow at two degrees of freedom.
    c      quantile of the largest |X_i - X_j| / se / sqrt(chi2_df / df) over the pairs, X ~ N(0, V + diag(s2 / S_m)):
           the studentised range (Tukey 1953; Hothorn, Bretz and Westfall 2008) with this covariance, by simulation

An interval is difference +- c se, and zero lies outside it exactly if the adjusted p is below 1 - confidence. How often
these intervals miss the truth, and where they miss too often: docs/decisions/0016.
Legend: R bootstrap draws, N runs, M methods, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from graftwerk.evaluation.bootstrap import Floats, Ints

POWER = 1.25
DRAWS = 4000
POWER_OF_TESTS = 0.8
"""A difference that is shown four times in five counts as one that could have been shown."""
FEW = 10
"""With fewer wrong rows than this, the variance over draws is an underestimate more often than not."""


@dataclass(frozen=True)
class Components:
    """Variance components of M methods' means.

    Attributes:
        rows: V, (M, M).
        between: MS, in squared units of the metric.
        within: w, likewise.
        seeds: S_m, (M,).
        degrees_between: Degrees of freedom of MS, or None if they are those of ``seeds``.
    """

    rows: Floats
    between: float
    within: float
    seeds: Ints | Floats
    degrees_between: int | None = None

    @property
    def nu(self) -> int:
        """Degrees of freedom between seeds, 0 if every method has one."""
        return int((self.seeds - 1).sum()) if self.degrees_between is None else self.degrees_between

    def combined(self, weights: Floats) -> Components:
        """Return the components of G weighted means of the methods, each method in one of them at most.

        Args:
            weights: (G, M); a row of them sums to one.
        """
        seeds: Floats = 1 / (weights**2 / self.seeds).sum(axis=1)
        return Components(weights @ self.rows @ weights.T, self.between, self.within, seeds, self.nu)

    @property
    def seed_variance(self) -> float:
        """s2; 0.0 if every method has one seed, which cannot tell."""
        return max(self.between - self.within, -self.within / 2) if self.nu else 0.0

    def degrees(self, squared_error: Floats, per_seed: Floats) -> float:
        """Return df for standard errors (P,) whose part from seeds is ``per_seed`` (P,) times MS; inf if there is none.

        ``per_seed`` is 1/S_i + 1/S_j for a difference, 1/S_m for a mean.
        """
        if not self.nu or self.between <= 0:
            return math.inf
        safe = np.where(squared_error > 0, squared_error, 1.0)
        share = float(np.minimum(per_seed * self.between / safe, 1.0).mean())
        df: float = self.nu / max(share, 1e-3) ** POWER
        return df


def components(draws: Floats, values: Floats, owner: Ints, row_effect: float = 0.0) -> Components:
    """Estimate the variance components.

    Args:
        draws: Bootstrap values of all runs (R, N) over the same draws of rows; none may be nan.
        values: Each run's value on all rows, (N,).
        owner: Which of the M methods each run is of, (N,).
        row_effect: What one wrong row changes in the metric. A method with few wrong rows gets half its square added
            to its variance, since draws of those rows understate it (they have none if no row is wrong).
    """
    member = np.eye(int(owner.max()) + 1)[owner]  # (N, M)
    seeds = member.sum(axis=0).astype(np.int64)
    means = draws @ member / seeds  # (R, M)
    rows = np.atleast_2d(np.cov(means.T, ddof=1))
    few = np.diag(rows) < FEW * row_effect**2
    rows = rows + np.diag(np.where(few, row_effect**2 / 2, 0.0))
    nu = int((seeds - 1).sum())
    if nu == 0:
        return Components(rows, 0.0, 0.0, seeds)
    between = float(((values - (values @ member / seeds)[owner]) ** 2).sum()) / nu
    centred = draws - means[:, owner]
    centred = centred - centred.mean(axis=0)
    within = float((centred**2).sum()) / (len(draws) - 1) / nu
    return Components(rows, between, within, seeds)


@dataclass(frozen=True)
class Pairs:
    """Standard errors of all pairs of methods, and the law of the largest studentised difference.

    Attributes:
        alike: Pairs (i, j) whose answers are the same on every row: their difference is 0 without error.
        seed: Of the simulation of that law.
    """

    parts: Components
    alike: frozenset[tuple[int, int]] = frozenset()
    seed: int = 0

    @cached_property
    def sides(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and the second method of each pair, (P,) each."""
        pairs = np.array(list(combinations(range(len(self.parts.rows)), 2)), dtype=np.int64)
        return pairs[:, 0], pairs[:, 1]

    @cached_property
    def from_rows(self) -> Floats:
        """V_ii + V_jj - 2 V_ij, (P,)."""
        i, j = self.sides
        v = self.parts.rows
        return np.maximum(v[i, i] + v[j, j] - 2 * v[i, j], 0.0)

    @cached_property
    def per_seed(self) -> Floats:
        """1/S_i + 1/S_j, (P,)."""
        i, j = self.sides
        one: Floats = 1 / self.parts.seeds
        return one[i] + one[j]

    @cached_property
    def errors(self) -> Floats:
        """Standard errors (P,) in the metric's unit; 0 for pairs that are alike."""
        squared = np.maximum(self.from_rows + self.per_seed * self.parts.seed_variance, self.from_rows / 2)
        known = [pair in self.alike for pair in zip(*(side.tolist() for side in self.sides), strict=True)]
        return np.where(known, 0.0, np.sqrt(squared))

    @cached_property
    def df(self) -> float:
        """Degrees of freedom of the standard errors."""
        return self.parts.degrees(self.errors**2, self.per_seed)

    @cached_property
    def largest(self) -> Floats:
        """Draws (DRAWS,) of the largest studentised difference over the pairs if the methods are all alike."""
        from scipy.special import gammaincinv

        rng = np.random.default_rng(self.seed)
        i, j = self.sides
        s2 = max(self.parts.seed_variance, 0.0)
        values, vectors = np.linalg.eigh(self.parts.rows)
        root = vectors * np.sqrt(np.clip(values, 0, None))
        x = rng.standard_normal((DRAWS, len(root))) @ root.T
        x += rng.standard_normal((DRAWS, len(root))) * np.sqrt(s2 / self.parts.seeds)
        error = np.sqrt(self.from_rows + self.per_seed * s2)
        safe = np.where((error > 0) & (self.errors > 0), error, np.inf)
        found: Floats = (np.abs(x[:, i] - x[:, j]) / safe).max(axis=1)
        if math.isfinite(self.df):  # chi-squared by its quantiles: the same spread with less noise than by draws
            quantiles = (np.arange(DRAWS) + 0.5) / DRAWS
            found = found / np.sqrt(2 * gammaincinv(self.df / 2, quantiles) / self.df)
        return found

    def factor(self, confidence: float) -> float:
        """Return c: half-widths are c times the standard errors."""
        return float(np.quantile(self.largest, confidence))

    def detectable(self, confidence: float) -> Floats:
        """Return the true differences (P,) that such intervals would show with probability `POWER_OF_TESTS`."""
        return (self.factor(confidence) + quantile(POWER_OF_TESTS, self.df)) * self.errors

    def adjusted_p(self, differences: Floats) -> Floats:
        """Return p (P,) of no difference, adjusted for the number of pairs."""
        size = np.divide(np.abs(differences), self.errors, out=np.zeros_like(differences), where=self.errors > 0)
        p: Floats = (1 + (self.largest[:, None] >= size).sum(axis=0)) / (1 + DRAWS)
        return p


def student(confidence: float, df: float) -> float:
    """Return the two-sided quantile of Student's t, of the normal law if ``df`` is infinite."""
    return quantile((1 + confidence) / 2, df)


def quantile(probability: float, df: float) -> float:
    """Return the quantile of Student's t, of the normal law if ``df`` is infinite."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(df, probability)) if math.isfinite(df) else float(ndtri(probability))


def probability_above(bound: float, value: float, error: float, df: float) -> float:
    """Return the probability that a true value lies above a bound, by Student's t around what was measured.

    Args:
        bound: The bound.
        value: What was measured.
        error: Its standard error; 0 if it is exact.
        df: Degrees of freedom of the error, inf for the normal law.

    Example:
        >>> probability_above(0.0, 0.0, 1.0, 4.0), probability_above(0.0, 1.0, 0.0, 4.0)
        (0.5, 1.0)
    """
    from scipy.special import ndtr, stdtr

    if error <= 0:
        return 0.5 if value == bound else float(value > bound)
    size = (value - bound) / error
    return float(stdtr(df, size)) if math.isfinite(df) else float(ndtr(size))
