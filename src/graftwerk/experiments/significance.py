"""Verdicts on the difference of two methods, from its interval [low, high] and a margin of equivalence m.

    better                 low > 0
    worse                  high < 0
    practically equal      -m < low and high < m, and neither of the above
    no difference shown    otherwise, and whenever every method has one seed

Signs are those of a metric where more is better. The intervals hold for all pairs together
(`evaluation.paired_bootstrap`). The recommendation is in `recommended_method.py`, the Pareto front in `pareto.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graftwerk.evaluation.metrics import METRICS
from graftwerk.evaluation.paired_bootstrap import Difference

MARGIN_POINTS = 1.0
"""Default margin, in points of the metric."""
MARGIN_SHARE = 0.01
"""Default margin for metrics without points (perplexity), as a share of the best mean."""

Verdict = Literal["better", "worse", "practically equal", "no difference shown"]


def margin_of(metric: str, best: float) -> float:
    """Return the default margin in the metric's own unit.

    Args:
        metric: Name of the metric.
        best: The best mean.
    """
    known = METRICS[metric]
    return MARGIN_POINTS / known.scale if known.words == " points" else MARGIN_SHARE * abs(best)


def verdict(difference: Difference, metric: str = "accuracy", margin: float | None = None) -> Verdict:
    """Return what the interval shows of `a` against `b`.

    One seed each shows nothing about methods, however far the two models at hand are apart.

    Args:
        difference: The difference.
        metric: Name of the metric, which says if more or less is better.
        margin: Margin of equivalence in the metric's own unit, or None to call nothing practically equal.
    """
    if has_one_seed(difference):
        return "no difference shown"
    if METRICS[metric].higher is False:
        difference = swapped(difference)
    if difference["low"] > 0:
        return "better"
    if difference["high"] < 0:
        return "worse"
    return "practically equal" if within_margin(difference, margin) else "no difference shown"


def within_margin(difference: Difference, margin: float | None) -> bool:
    """Return True if the whole interval lies within the margin of equivalence."""
    return margin is not None and -margin < difference["low"] and difference["high"] < margin


def has_one_seed(difference: Difference) -> bool:
    """Return True if the interval covers sampling of rows only, since no method has more than one seed."""
    return not difference.get("over_seeds", True)


def excludes_zero(difference: Difference) -> bool:
    """Return True if the interval excludes zero."""
    return difference["low"] > 0 or difference["high"] < 0


def describe_difference(difference: Difference, metric: str = "accuracy", margin: float | None = None) -> str:
    """Return ``better by 1.2 points [0.3, 2.1]``, or ``no difference shown: +0.4 points [-0.8, +1.6]``.

    With one seed each: ``+1.2 points [+0.3, +2.1] with one seed each, and another may reverse it``. Within a margin:
    ``practically equal: +0.1 points [-0.4, +0.6]``, and ``better by 0.4 points [0.1, 0.7], less than the margin``.
    """
    known = METRICS[metric]
    found = verdict(difference, metric, margin)
    if found in ("no difference shown", "practically equal"):
        value, low, high = (known.text(difference[part], signed=True) for part in ("value", "low", "high"))
        span = f"{value}{known.words} [{low}, {high}]"
        return (
            f"{span} with one seed each, and another may reverse it"
            if excludes_zero(difference)
            else f"{found}: {span}"
        )
    larger = difference if difference["low"] > 0 else swapped(difference)
    value, low, high = (known.text(larger[part]) for part in ("value", "low", "high"))
    small = ", less than the margin" if within_margin(difference, margin) else ""
    return f"{found} by {value}{known.words} [{low}, {high}]{small}"


def swapped(difference: Difference) -> Difference:
    """Return the difference of `b` to `a`."""
    other: Difference = {
        **difference,
        "a": difference["b"],
        "b": difference["a"],
        "value": -difference["value"],
        "low": -difference["high"],
        "high": -difference["low"],
    }
    if "p_larger" in difference:
        other["p_larger"] = 1 - difference["p_larger"]
    return other


def find_difference(differences: Sequence[Difference], a: str, b: str) -> Difference:
    """Return the difference of `a` to `b`, whichever way round it was computed.

    Raises:
        KeyError: There is none of these two.
    """
    for difference in differences:
        if (difference["a"], difference["b"]) == (a, b):
            return difference
        if (difference["a"], difference["b"]) == (b, a):
            return swapped(difference)
    raise KeyError((a, b))
