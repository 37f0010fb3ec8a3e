"""A comparison's result in plain words, from its verdicts and its recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftwerk.reporting import numbers
from graftwerk.reporting.files import at, items, mapping, mappings, number, words
from graftwerk.reporting.tradeoff import COSTS

Verdict = Literal["better", "worse", "practically equal", "no difference shown"]
_SWAPPED: dict[Verdict, Verdict] = {
    "better": "worse",
    "worse": "better",
    "practically equal": "practically equal",
    "no difference shown": "no difference shown",
}


@dataclass(frozen=True)
class Difference:
    """Difference of ``a`` over ``b`` in the metric's own unit, positive if ``a`` is better, with its verdict."""

    a: str
    b: str
    value: float
    low: float
    high: float
    p: float | None
    verdict: Verdict
    one_seed: bool = False
    p_better: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Return True if the interval excludes zero; with one seed that shows nothing about methods."""
        return self.low > 0 or self.high < 0

    def swapped(self) -> Difference:
        """Return the same difference as that of ``b`` over ``a``."""
        verdict = _SWAPPED[self.verdict]
        chance = None if self.p_better is None else 1 - self.p_better
        return Difference(self.b, self.a, -self.value, -self.high, -self.low, self.p, verdict, self.one_seed, chance)


def measured(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the measured methods, best mean first."""
    found = [method for method in mappings(result, "methods") if number(method, "figure", "value") is not None]
    sign = 1 if words(result, "metric") in numbers.LESS_IS_BETTER else -1
    return sorted(found, key=lambda method: sign * (number(method, "figure", "value") or 0.0))


def differences(result: Mapping[str, Any]) -> list[Difference]:
    """Return the complete differences, largest first, each swapped so that the better mean comes first."""
    found = []
    less = words(result, "metric") in numbers.LESS_IS_BETTER
    for entry in mappings(result, "differences"):
        value, low, high = (number(entry, part) for part in ("value", "low", "high"))
        if value is None or low is None or high is None:
            continue
        if less:  # seen so that more is better, as everything below takes it; values stay in their unit
            value, low, high = -value, -high, -low
        verdict: Verdict
        one_seed = at(entry, "over_seeds") is False or len(items(result, "seeds")) == 1
        match "no difference shown" if one_seed else words(entry, "verdict"):
            case "better" | "worse" | "practically equal" | "no difference shown" as said:
                verdict = said
            case _:
                verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        a, b, p = words(entry, "a"), words(entry, "b"), number(entry, "p")
        difference = Difference(a, b, value, low, high, p, verdict, one_seed, number(entry, "p_better"))
        found.append(difference if value >= 0 else difference.swapped())
    return sorted(found, key=lambda difference: -difference.value)


def find_difference(found: Sequence[Difference], a: str, b: str) -> Difference | None:
    """Return the difference of ``a`` over ``b``, or None if it is not among those found."""
    for difference in found:
        if (difference.a, difference.b) == (a, b):
            return difference
        if (difference.a, difference.b) == (b, a):
            return difference.swapped()
    return None


def recommended(result: Mapping[str, Any]) -> str | None:
    """Return the recommended method if it was measured, else None."""
    name = words(result, "recommendation", "method")
    return name if any(words(method, "name") == name for method in measured(result)) else None


def headline(result: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    methods = measured(result)
    metric = numbers.metric_name(words(result, "metric") or "quality")
    if not methods:
        if words(result, "status") == "running":
            return "This comparison is not finished: there is no result yet"
        return "No run of this comparison gave a result"
    names = [words(method, "name") for method in methods]
    if words(result, "at_chance"):
        who = f"{words(methods[0], 'name')} is not" if len(methods) == 1 else "Take none of them yet: none is"
        return f"{who} shown to be better than always answering the most frequent label"
    if len(methods) == 1:
        value = numbers.value_of(words(result, "metric"), number(methods[0], "figure", "value"))
        return f"{names[0]} reaches {value} {metric}; there is no other result to compare it with"
    found = differences(result)
    best, chosen = names[0], recommended(result)
    if chosen is None:
        return f"{best} has the best mean {metric}; {_beaten(found, best, names)}"
    if chosen == best:
        return f"Take {best}: {_beaten(found, best, names)}"
    saving = _saving(result, chosen, best)
    against = find_difference(found, chosen, best)
    if against is not None and against.verdict == "worse":
        key = words(result, "metric")
        points = numbers.signed(key, -against.value).lstrip("+") + numbers.unit(key)
        return f"Take {chosen}: it costs less than {best}, which is better by {points}"
    if against is not None and against.verdict == "practically equal":
        return f"Take {chosen}: it is practically equal to {best}, the best mean{saving}"
    return f"Take {chosen}: it is not shown to be worse than {best}, the best mean{saving}"


def reason(result: Mapping[str, Any]) -> str:
    """Return the reason of the recommendation as a sentence."""
    said = words(result, "recommendation", "reason")
    chosen = recommended(result)
    return f"Why {chosen}: {said}." if said and chosen else ""


def resolution(result: Mapping[str, Any]) -> str:
    """Return a sentence on the smallest difference that can be shown; empty if it is not known."""
    value = number(result, "resolution")
    if value is None:
        return ""
    if value == 0:
        return (
            "At least half of the pairs of methods gave the same answers on every row: nothing here tells those apart."
        )
    metric = words(result, "metric")
    least = f"{numbers.bare(metric, value)}{numbers.unit(metric)}"
    found = number(result, "detectable")
    power = (
        f"; one of {numbers.bare(metric, found)}{numbers.unit(metric)} would be shown four times in five"
        if found
        else ""
    )
    return f"With these rows and seeds, differences under about {least} cannot be shown{power}."


def seed_spread(result: Mapping[str, Any]) -> str:
    """Return what the intervals assume about seeds, in a sentence; nothing if every method has one."""
    spread, metric = number(result, "seed_spread"), words(result, "metric")
    if spread is None:
        return ""
    size = f"{numbers.bare(metric, spread)}{numbers.unit(metric)}"
    return (
        f"Seeds of one method differ with a standard deviation of {size}, pooled over the methods. The intervals take "
        "it to be the same for every method, and are too narrow between methods whose own is far above it."
    )


def _beaten(found: Sequence[Difference], best: str, names: Sequence[str]) -> str:
    others = [name for name in names if name != best]
    if any(difference.one_seed for difference in found):
        return "it has the best value of one seed each, and another seed may reverse that"
    better = [
        name for name in others if (d := find_difference(found, best, name)) is not None and d.verdict == "better"
    ]
    if len(better) == len(others):
        return f"it is better than {others[0]}" if len(others) == 1 else "it is better than all the others"
    equal = [
        name
        for name in others
        if (d := find_difference(found, best, name)) is not None and d.verdict == "practically equal"
    ]
    if len(equal) == len(others):
        return (
            f"it has the best mean, and is practically equal to {others[0] if len(others) == 1 else 'all the others'}"
        )
    if not better:
        if len(others) == 1:
            return f"it has the higher mean, but no difference to {others[0]} is shown"
        return "it has the best mean, but no difference to the others is shown"
    return f"it has the best mean, and is shown to be better than {len(better)} of the {len(others)} others"


def _saving(result: Mapping[str, Any], chosen: str, best: str) -> str:
    """``, at 1.5 % of its trained parameters``: what the preferred cost of one is of the other's."""
    prefer = words(result, "prefer")
    costs = {words(method, "name"): mapping(at(method, "cost")) for method in measured(result)}
    own, other = number(costs[chosen], prefer), number(costs[best], prefer)
    name = next((cost.name for cost in COSTS if cost.key == prefer), None)
    if own is None or other is None or other <= 0 or own >= other or name is None:
        return ""
    return f", at {numbers.share(own / other)} of its {name}"
