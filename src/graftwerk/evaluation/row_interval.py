"""The interval of one metric over bootstrap draws of the rows, or the bound that stands for it where they are alike."""

from __future__ import annotations

import math
from typing import NotRequired, TypedDict

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, percentile_interval

FEW_DRAWS = 0.5
"""An interval stands on at least this share of the draws; with fewer the rows cannot carry one."""


class MetricValue(TypedDict):
    """A metric with its interval.

    Attributes:
        value: The value, or None if it is undefined.
        low: Lower bound of the interval, or None if there is no interval.
        high: Upper bound, likewise.
        note: A remark on the value, if it needs one.
        signature: Settings that others need to get the same number, if the metric has any.
    """

    value: float | None
    low: float | None
    high: float | None
    note: NotRequired[str]
    signature: NotRequired[str]


def enough_draws(defined: int, draws: int) -> bool:
    """Return True if enough resamples leave the metric defined to compute an interval from them."""
    return defined >= FEW_DRAWS * draws and defined > 1


def interval_over_rows(
    value: float, draws: Floats, confidence: float, bounds: tuple[float, float], effect: float
) -> MetricValue:
    """Return a value with the percentile interval of its draws (R,), or the exact bound where these show no spread.

    Args:
        value: The value on all rows.
        draws: (R,) the value of each resample, nan where it is undefined.
        confidence: Level of the interval, 0 to 1.
        bounds: The least and the greatest value that the metric can have.
        effect: Change of the value by one wrong row, as `metrics.row_effect` says.
    """
    undefined = int(np.isnan(draws).sum())
    if not enough_draws(len(draws) - undefined, len(draws)):
        note = f"no interval: {undefined} of {len(draws)} draws lack a class; a class has too few rows"
        return {"value": value, "low": None, "high": None, "note": note}
    low, high = percentile_interval(draws, confidence)
    figure: MetricValue = {"value": value, "low": low, "high": high}
    if low == high and math.isclose(low, value, abs_tol=1e-12):
        if effect and any(math.isclose(value, bound, abs_tol=1e-12) for bound in bounds):
            return _certain(value, bounds, effect, confidence)
        figure["note"] = "every draw of these rows gives the same value: the interval shows no spread, not certainty"
    elif undefined:
        figure["note"] = f"{undefined} of {len(draws)} draws lacked a class and are left out of the interval"
    return figure


def _certain(value: float, bounds: tuple[float, float], effect: float, confidence: float) -> MetricValue:
    """All rows right or all wrong: every draw is alike, so the bootstrap has no width; the exact binomial bound has.

    With no failure in n rows the one-sided bound p solves p^n = 1 - confidence (Clopper and Pearson, 1934). Where
    classes or data sets count the same, n is the number of rows that one row's effect stands for: a metric with few
    rows of a class knows less than its rows say.
    """
    least, most = bounds
    missed = (most - least) * (1 - (1 - confidence) ** (effect / (most - least)))
    note = "all rows alike, so resampling shows no spread; the bound is the exact binomial one"
    if math.isclose(value, most):
        return {"value": value, "low": most - missed, "high": value, "note": note}
    return {"value": value, "low": value, "high": least + missed, "note": note}
