"""Significance of a comparison's results: verdicts on differences, the Pareto front, and the recommendation."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from graftwerk.errors import ConfigError
from graftwerk.evaluation.metrics import METRICS
from graftwerk.evaluation.paired_bootstrap import Difference

COSTS: dict[str, str] = {
    "trained_parameters": "trained parameters",
    "adapter_bytes": "adapter size",
    "training_seconds": "training time",
    "peak_memory_bytes": "peak memory",
    "latency_ms_batch_1": "latency, one row",
    "latency_ms_batch_32": "latency, 32 rows",
}
"""What a method costs, and how that is called; smaller is better for all."""

MARGIN = 1.0
"""A method this many points below the best is still near it."""
RELATIVE_MARGIN = 0.01
"""Likewise for metrics without points (perplexity), as a share of the best."""
NEAR = 0.5
"""So is one within this share of the half-width of its interval: of what these rows and seeds can show at all."""
FAR = 3.0
"""But not beyond so many margins: a wide interval is no argument for a method."""
ALIKE = 0.1
"""Costs within a tenth of each other count as equal, and training time decides."""

FRONT = ("peak_memory_bytes", "training_seconds", "adapter_bytes")
"""Costs of the front in several costs at once: memory, time, size."""

Verdict = Literal["better", "worse", "practically equal", "no difference shown"]


def margin_of(metric: str, best: float) -> float:
    """Return how far below the best a method always is near it, in the metric's own unit."""
    known = METRICS[metric]
    return MARGIN / known.scale if known.words == " points" else RELATIVE_MARGIN * abs(best)


def verdict(difference: Difference, metric: str = "accuracy", margin: float | None = None) -> Verdict:
    """Return what the interval shows of `a` against `b`; where less is better, less is better.

    One seed each shows nothing about methods, however far the two models at hand are apart.

    Args:
        difference: The difference.
        metric: Name of the metric.
        margin: Methods are practically equal if the whole interval is nearer to zero than this; None never says so.
    """
    if one_seed(difference):
        return "no difference shown"
    if METRICS[metric].higher is False:
        difference = turned(difference)
    if difference["low"] > 0:
        return "better"
    if difference["high"] < 0:
        return "worse"
    return "practically equal" if within(difference, margin) else "no difference shown"


def within(difference: Difference, margin: float | None) -> bool:
    """Return True if the whole interval is nearer to zero than a margin."""
    return margin is not None and -margin < difference["low"] and difference["high"] < margin


def one_seed(difference: Difference) -> bool:
    """Return True if the interval covers sampling of rows only, since no method has more than one seed."""
    return not difference.get("over_seeds", True)


def apart(difference: Difference) -> bool:
    """Return True if the interval excludes zero."""
    return difference["low"] > 0 or difference["high"] < 0


def in_words(difference: Difference, metric: str = "accuracy", margin: float | None = None) -> str:
    """Return ``better by 1.2 points [0.3, 2.1]``, or ``no difference shown: +0.4 points [-0.8, +1.6]``.

    With one seed each: ``+1.2 points [+0.3, +2.1] with one seed each, and another may reverse it``. Within a margin:
    ``practically equal: +0.1 points [-0.4, +0.6]``, and ``better by 0.4 points [0.1, 0.7], less than the margin``.
    """
    known = METRICS[metric]
    found = verdict(difference, metric, margin)
    if found in ("no difference shown", "practically equal"):
        value, low, high = (known.text(difference[part], signed=True) for part in ("value", "low", "high"))
        span = f"{value}{known.words} [{low}, {high}]"
        return f"{span} with one seed each, and another may reverse it" if apart(difference) else f"{found}: {span}"
    larger = difference if difference["low"] > 0 else turned(difference)
    value, low, high = (known.text(larger[part]) for part in ("value", "low", "high"))
    small = ", less than the margin" if within(difference, margin) else ""
    return f"{found} by {value}{known.words} [{low}, {high}]{small}"


def turned(difference: Difference) -> Difference:
    """Return the difference with its two methods exchanged."""
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


def between(differences: Sequence[Difference], a: str, b: str) -> Difference:
    """Return the difference of `a` to `b`, whichever way round it was computed."""
    for difference in differences:
        if (difference["a"], difference["b"]) == (a, b):
            return difference
        if (difference["a"], difference["b"]) == (b, a):
            return turned(difference)
    raise KeyError((a, b))


def pareto_front(quality: Mapping[str, float], cost: Mapping[str, float], metric: str = "accuracy") -> list[str]:
    """Return the Pareto front of quality and cost by point values, cheapest first.

    A method is dominated by another that is at least as good and as cheap, and better in one of the two.
    """
    front = pareto_set(quality, [cost], metric)
    return sorted(front, key=lambda name: cost[name])


def pareto_set(
    quality: Mapping[str, float], costs: Sequence[Mapping[str, float]], metric: str = "accuracy"
) -> list[str]:
    """Return the Pareto front of quality and several costs by point values: what no other method beats in all of them.

    Args:
        quality: Value of the metric by method.
        costs: Each cost by method; methods without one of them are left out.
        metric: Name of the metric.
    """
    known = [name for name in quality if all(name in cost for cost in costs)]
    sign = 1 if METRICS[metric].higher is False else -1
    losses = {name: (sign * quality[name], *(cost[name] for cost in costs)) for name in known}

    def beaten(name: str) -> bool:
        own = losses[name]
        return any(other != own and all(map(operator.le, other, own)) for other in losses.values())

    return [name for name in known if not beaten(name)]


def recommend(
    methods: Sequence[Mapping[str, Any]],
    differences: Sequence[Difference],
    *,
    prefer: str,
    margin: float | None = None,
    metric: str = "accuracy",
) -> dict[str, str] | None:
    """Recommend the cheapest of the methods that are as good as the best, as far as these rows and seeds can tell.

    Of the candidates, the one with the lowest preferred cost wins; among those within a tenth of it, the one that
    trains fastest. A candidate's interval against the best mean includes zero, and its mean is close to the best: at
    most a margin below, or half of the interval's half-width, but never more than three margins, since with few rows
    every interval includes zero. The reason names each cheaper method whose interval includes zero and that was
    rejected for its mean.

    Args:
        methods: Each with ``name``, ``figure`` and ``cost``.
        differences: The differences between the methods, with intervals.
        prefer: The cost to minimise, one of `COSTS`.
        margin: Distance below the best mean, in the metric's own unit, or None for the rule above.
        metric: Name of the metric.

    Returns:
        ``method`` and ``reason``, or None if nothing was measured.

    Raises:
        ConfigError: There is no such cost.
    """
    if prefer not in COSTS:
        raise ConfigError(f"there is no cost `{prefer}`", where="prefer", hint=f"there are: {', '.join(COSTS)}")
    known = METRICS[metric]
    measured = sorted(methods, key=lambda method: -known.better(method["figure"]["value"], 0.0))
    if not measured:
        return None
    best, least_margin = measured[0], margin_of(metric, measured[0]["figure"]["value"])
    equal = least_margin if margin is None else margin

    def near(method: Mapping[str, Any]) -> bool:
        to_best = between(differences, method["name"], best["name"])
        by_interval = min(max(least_margin, NEAR * (to_best["high"] - to_best["low"]) / 2), FAR * least_margin)
        allowed = by_interval if margin is None else margin
        return known.better(method["figure"]["value"], best["figure"]["value"]) >= -allowed

    level = [m for m in measured if m is best or not apart(between(differences, m["name"], best["name"]))]
    candidates = [method for method in level if method is best or near(method)]
    costed = [method for method in candidates if method["cost"].get(prefer) is not None]
    if not costed:
        return {"method": best["name"], "reason": f"the best mean; {COSTS[prefer]} could not be measured"}
    least = min(method["cost"][prefer] for method in costed)
    cheapest = [method for method in costed if method["cost"][prefer] <= (1 + ALIKE) * least]
    chosen = min(
        cheapest, key=lambda method: (method["cost"].get("training_seconds") or float("inf"), method["cost"][prefer])
    )
    reason = _reason(chosen, best, measured, candidates, differences, prefer, metric, equal)
    cheaper = [m for m in level if m not in candidates and (m["cost"].get(prefer) or math.inf) < chosen["cost"][prefer]]
    if cheaper:
        gaps = [method["figure"]["value"] - best["figure"]["value"] for method in cheaper]
        named = ", ".join(
            f"{method['name']} ({known.text(gap, signed=True)})" for method, gap in zip(cheaper, gaps, strict=True)
        )
        reason += f"; cheaper in {COSTS[prefer]} and not shown to be worse, but not near the best mean: {named}"
    return {"method": chosen["name"], "reason": reason}


def at_chance(
    methods: Sequence[Mapping[str, Any]], blind: float | None, share: float | None, metric: str
) -> str | None:
    """Return a note if no method is shown to beat the majority baseline, or None if one is or it cannot be told.

    Args:
        methods: As for `recommend`.
        blind: The metric of always answering the most frequent label, or None if it is undefined.
        share: That label's share of the rows, or None if rows have no labels.
        metric: Name of the metric.
    """
    if not methods or blind is None or share is None:
        return None
    best = max(methods, key=lambda method: method["figure"]["value"])
    low = best["figure"].get("low")
    if low is None or low > blind:
        return None
    none = "no method is" if len(methods) > 1 else f"{best['name']} is not"
    worth = "" if metric == "accuracy" else f", which has a {metric.replace('_', ' ')} of {100 * blind:.1f}"
    return (
        f"{none} shown to be better than always answering the most frequent label "
        f"({100 * share:.1f} % of the rows){worth}"
    )


def _reason(
    chosen: Mapping[str, Any],
    best: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]],
    candidates: Sequence[Mapping[str, Any]],
    differences: Sequence[Difference],
    prefer: str,
    metric: str,
    margin: float,
) -> str:
    known = METRICS[metric]
    if len(measured) == 1:
        return "the only method that was measured"
    if chosen is best:
        others = [between(differences, best["name"], method["name"]) for method in measured[1:]]
        ahead = sum(apart(difference) for difference in others)
        shown = "ahead, with one seed, of" if any(map(one_seed, others)) else "shown to be better than"
        if ahead == len(others):
            return f"the best mean, and {shown} all others"
        if len(candidates) > 1:
            return f"the best mean, and the least {COSTS[prefer]} of the {len(candidates)} methods near it"
        if ahead:
            return f"the best mean, and {shown} {ahead} of the {len(others)} others"
        return "the best mean; no difference to the others is shown"
    difference = between(differences, chosen["name"], best["name"])
    found = verdict(difference, metric, margin)
    worst = difference["high"] if known.higher is False else -difference["low"]
    ratio = chosen["cost"][prefer] / best["cost"][prefer] if best["cost"].get(prefer) else None
    saving = f" with {_share(ratio)} of its {COSTS[prefer]}" if ratio is not None and ratio < 1 else ""
    if difference["low"] == difference["high"] == 0:
        return f"the same answers as {best['name']} on every row,{saving}"
    return (
        f"{known.text(difference['value'], signed=True)}{known.words} against {best['name']}, the best mean, "
        f"{found}{saving}; the interval allows it to be up to {known.text(worst)}{known.words} worse"
    )


def _share(ratio: float) -> str:
    """Convert 0.0147 to `1.5 %`."""
    percent = 100 * ratio
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 0.1 else "less than 0.1 %"
