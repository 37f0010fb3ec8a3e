"""The method that a comparison recommends: the cheapest of those near the best mean, and the reason in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.errors import ConfigError
from graftwerk.evaluation.metrics import METRICS
from graftwerk.evaluation.paired_bootstrap import Difference
from graftwerk.experiments.pareto import COSTS
from graftwerk.experiments.significance import excludes_zero, find_difference, has_one_seed, margin_of, verdict

NEAR_HALF_WIDTHS = 0.5
"""A mean is near the best within this share of its interval's half-width: of what these rows and seeds can show."""
MOST_MARGINS = 3.0
"""But not beyond so many margins: a wide interval is no argument for a method."""
EQUAL_COST = 0.1
"""Costs within a tenth of each other count as equal, and training time decides."""


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
    best, default_margin = measured[0], margin_of(metric, measured[0]["figure"]["value"])

    def to_best(method: Mapping[str, Any]) -> Difference:
        return find_difference(differences, method["name"], best["name"])

    def near(method: Mapping[str, Any]) -> bool:
        difference = to_best(method)
        half_width = (difference["high"] - difference["low"]) / 2
        by_interval = min(max(default_margin, NEAR_HALF_WIDTHS * half_width), MOST_MARGINS * default_margin)
        allowed = by_interval if margin is None else margin
        return known.better(method["figure"]["value"], best["figure"]["value"]) >= -allowed

    undecided = [method for method in measured if method is best or not excludes_zero(to_best(method))]
    candidates = [method for method in undecided if method is best or near(method)]
    priced = [method for method in candidates if method["cost"].get(prefer) is not None]
    if not priced:
        return {"method": best["name"], "reason": f"the best mean; {COSTS[prefer]} could not be measured"}
    least = min(method["cost"][prefer] for method in priced)
    cheapest = [method for method in priced if method["cost"][prefer] <= (1 + EQUAL_COST) * least]
    chosen = min(
        cheapest, key=lambda method: (method["cost"].get("training_seconds") or float("inf"), method["cost"][prefer])
    )
    equal = default_margin if margin is None else margin
    reason = _reason(chosen, best, measured, candidates, differences, prefer, metric, equal)
    rejected = [method for method in undecided if method not in candidates]
    cheaper = [method for method in rejected if (method["cost"].get(prefer) or math.inf) < chosen["cost"][prefer]]
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
        others = [find_difference(differences, best["name"], method["name"]) for method in measured[1:]]
        ahead = sum(excludes_zero(difference) for difference in others)
        shown = "ahead, with one seed, of" if any(map(has_one_seed, others)) else "shown to be better than"
        if ahead == len(others):
            return f"the best mean, and {shown} all others"
        if len(candidates) > 1:
            return f"the best mean, and the least {COSTS[prefer]} of the {len(candidates)} methods near it"
        if ahead:
            return f"the best mean, and {shown} {ahead} of the {len(others)} others"
        return "the best mean; no difference to the others is shown"
    difference = find_difference(differences, chosen["name"], best["name"])
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
