"""Differences in words: what may be called better, what is on the front, what is recommended and why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.errors import ConfigError
from graftwerk.evaluation.metrics import METRICS
from graftwerk.evaluation.paired_bootstrap import Difference
from graftwerk.experiments.pareto import pareto_front, pareto_set
from graftwerk.experiments.recommended_method import at_chance, recommend
from graftwerk.experiments.significance import describe_difference, excludes_zero, find_difference, swapped, verdict


def difference(a: str, b: str, value: float, half: float) -> Difference:
    return {"a": a, "b": b, "value": value, "low": value - half, "high": value + half, "p": None}


def method(name: str, value: float, parameters: float | None, seconds: float = 10.0) -> dict[str, Any]:
    figure = {"value": value, "low": value - 0.03, "high": value + 0.03}
    return {"name": name, "figure": figure, "cost": {"trained_parameters": parameters, "training_seconds": seconds}}


def pairs(methods: list[dict[str, Any]], half: float) -> list[Difference]:
    return [
        difference(a["name"], b["name"], a["figure"]["value"] - b["figure"]["value"], half)
        for place, a in enumerate(methods)
        for b in methods[place + 1 :]
    ]


def test_describe_difference_states_direction_and_interval() -> None:
    assert describe_difference(difference("a", "b", 0.012, 0.009)) == "better by 1.2 points [0.3, 2.1]"
    assert describe_difference(difference("a", "b", -0.012, 0.009)) == "worse by 1.2 points [0.3, 2.1]"
    assert describe_difference(difference("a", "b", 0.004, 0.012)) == "no difference shown: +0.4 points [−0.8, +1.6]"
    assert describe_difference(difference("a", "b", 0.0, 0.0)) == "no difference shown: 0.0 points [0.0, 0.0]"


def test_verdict_within_the_margin_is_practically_equal() -> None:
    near, wide = difference("a", "b", 0.001, 0.006), difference("a", "b", 0.001, 0.011)
    assert verdict(near, "accuracy", 0.01) == verdict(swapped(near), "accuracy", 0.01) == "practically equal"
    assert verdict(near) == verdict(wide, "accuracy", 0.01) == "no difference shown"
    assert describe_difference(near, "accuracy", 0.01) == "practically equal: +0.1 points [−0.5, +0.7]"
    small = difference("a", "b", 0.004, 0.003)  # better, and too little to matter
    assert describe_difference(small, "accuracy", 0.01) == "better by 0.4 points [0.1, 0.7], less than the margin"
    one_seed: Difference = {**near, "over_seeds": False}
    assert verdict(one_seed, "accuracy", 0.01) == "no difference shown"


def test_pareto_set_knows_several_costs() -> None:
    quality = {"big": 0.80, "small": 0.78, "slow": 0.78, "poor": 0.70, "unknown": 0.9}
    memory, seconds = {"big": 9, "small": 2, "slow": 2, "poor": 3}, {"big": 5, "small": 5, "slow": 9, "poor": 1}
    assert pareto_set(quality, [memory, seconds]) == ["big", "small", "poor"]
    assert pareto_set(quality, [memory]) == ["big", "small", "slow"]
    losses = {name: 1 - value for name, value in quality.items()}
    assert pareto_set(losses, [memory, seconds], "perplexity") == ["big", "small", "poor"]


def test_recommend_says_practically_equal_where_the_interval_does() -> None:
    methods = [method("big", 0.801, 900), method("small", 0.80, 10)]
    found = recommend(methods, pairs(methods, 0.004), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "small"
    assert "−0.1 points against big, the best mean, practically equal with 1.1 % of its" in found["reason"]
    found = recommend(methods, pairs(methods, 0.004), prefer="trained_parameters", margin=0.002)
    assert found is not None
    assert "no difference shown" in found["reason"]


def test_verdict_interval_touching_zero_is_no_difference() -> None:
    assert verdict({"a": "a", "b": "b", "value": 0.01, "low": 0.0, "high": 0.02, "p": None}) == "no difference shown"
    assert verdict({"a": "a", "b": "b", "value": 0.01, "low": 1e-9, "high": 0.02, "p": None}) == "better"


def test_signed_uses_plus_and_minus_signs() -> None:
    shown = [METRICS["bleu"].text(x, signed=True) for x in (1.25, -1.25, 0.01, -0.01, 0.0)]
    assert shown == ["+1.2", "−1.2", "0.0", "0.0", "0.0"]


def test_find_difference_returns_difference_in_either_order() -> None:
    one = difference("a", "b", 0.02, 0.01)
    assert find_difference([one], "a", "b") == one
    assert find_difference([one], "b", "a") == swapped(one)
    assert swapped(swapped(one)) == one
    assert swapped(one)["low"] == -one["high"]
    with pytest.raises(KeyError):
        find_difference([one], "a", "c")


def test_pareto_front_known_values() -> None:
    quality = {"full": 0.79, "lora": 0.79, "prefix": 0.77, "bitfit": 0.75, "prompt": 0.70, "probe": 0.64}
    cost = {"full": 100.0, "lora": 10.0, "prefix": 10.0, "bitfit": 5.0, "prompt": 6.0, "probe": 1.0}
    assert pareto_front(quality, cost) == ["probe", "bitfit", "lora"]
    assert pareto_front({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == ["a", "b"]  # neither beats its equal
    assert pareto_front(quality, {"lora": 1.0}) == ["lora"]  # a cost that was not measured is no cost of zero


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_pareto_front_holds_exactly_the_undominated(points: list[tuple[int, int]]) -> None:
    quality = {str(i): float(q) for i, (q, _) in enumerate(points)}
    cost = {str(i): float(c) for i, (_, c) in enumerate(points)}
    front = set(pareto_front(quality, cost))
    assert front
    for name in quality:
        better = [
            other
            for other in quality
            if quality[other] >= quality[name]
            and cost[other] <= cost[name]
            and (quality[other], cost[other]) != (quality[name], cost[name])
        ]
        assert (name not in front) == bool(better)


def test_recommend_takes_cheapest_of_equally_good() -> None:
    methods = [method("full", 0.792, 22e6), method("lora", 0.788, 3e5), method("bitfit", 0.754, 2e4)]
    found = recommend(methods, pairs(methods, 0.02), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "lora"
    assert found["reason"] == (
        "−0.4 points against full, the best mean, no difference shown with 1.4 % of its trained parameters; "
        "the interval allows it to be up to 2.4 points worse"
    )


@pytest.mark.parametrize(("cost", "chosen"), [(1.09e5, "bottleneck"), (1.11e5, "lora")])
def test_recommend_cost_within_a_tenth_takes_faster(cost: float, chosen: str) -> None:
    methods = [method("full", 0.8, 22e6), method("lora", 0.799, 1e5, 20.0), method("bottleneck", 0.798, cost, 10.0)]
    found = recommend(methods, pairs(methods, 0.02), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == chosen


def test_recommend_equal_answers_are_named_in_reason() -> None:
    methods = [method("full", 0.5, 22e6), method("ia3", 0.5, 2.2e4)]
    found = recommend(methods, pairs(methods, 0.0), prefer="trained_parameters")
    assert found is not None
    assert found["reason"] == "the same answers as full on every row, with 0.1 % of its trained parameters"


def test_recommend_wide_interval_does_not_favour_poor_method() -> None:
    """Twenty rows show nothing; that does not make a method five points below a good choice."""
    methods = [method("full", 0.80, 22e6), method("probe", 0.75, 800)]
    found = recommend(methods, pairs(methods, 0.3), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "full"
    assert found["reason"] == (
        "the best mean; no difference to the others is shown; cheaper in trained parameters and not shown to be worse, "
        "but not near the best mean: probe (−5.0)"
    )


def test_recommend_takes_cheap_method_within_half_of_resolution() -> None:
    """Two points below where differences under 5.5 are not to be seen: near; with 3.0, it is passed over and named."""
    methods = [
        method("lora", 0.766, 339e3),
        method("full", 0.76, 22.7e6),
        method("ia3", 0.746, 14.6e3),
        method("probe", 0.7, 770),
    ]
    found = recommend(methods, pairs(methods, 0.055), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "ia3"
    assert found["reason"].startswith("−2.0 points against lora, the best mean, no difference shown with 4.3 % of its")
    found = recommend(methods, pairs(methods, 0.03), prefer="trained_parameters")
    assert found == {
        "method": "lora",
        "reason": "the best mean, and the least trained parameters of the 2 methods near it; cheaper in trained "
        "parameters and not shown to be worse, but not near the best mean: ia3 (−2.0)",
    }
    asked = recommend(methods, pairs(methods, 0.055), prefer="trained_parameters", margin=0.01)
    assert asked is not None
    assert asked["method"] == "lora"


@given(st.lists(st.integers(600, 800), min_size=2, max_size=6, unique=True), st.integers(1, 200), st.booleans())
def test_recommend_reason_agrees_with_intervals(values: list[int], half: int, seeded: bool) -> None:
    """Whoever is not shown to be worse and costs less than the choice is named; nobody who is shown to be worse is."""
    methods = [method(f"m{i}", value / 1000, 10.0 ** (i + 1)) for i, value in enumerate(values)]
    differences = pairs(methods, half / 1000)
    if not seeded:
        differences = [{**difference, "over_seeds": False} for difference in differences]
    found = recommend(methods, differences, prefer="trained_parameters")
    assert found is not None
    best = max(methods, key=lambda one: one["figure"]["value"])
    chosen = next(one for one in methods if one["name"] == found["method"])
    named = found["reason"].partition("not near the best mean: ")[2]
    for one in methods:
        if one is best:
            continue
        undecided = not excludes_zero(find_difference(differences, one["name"], best["name"]))
        cheaper = one["cost"]["trained_parameters"] < chosen["cost"]["trained_parameters"]
        assert (f"{one['name']} (" in named) == (undecided and cheaper)
    if not seeded:
        assert "better" not in found["reason"]


def test_verdict_one_seed_is_no_difference() -> None:
    far: Difference = {**difference("a", "b", 0.05, 0.01), "over_seeds": False}
    assert verdict(far) == verdict(swapped(far)) == "no difference shown"
    assert describe_difference(far) == "+5.0 points [+4.0, +6.0] with one seed each, and another may reverse it"
    assert describe_difference({**far, "low": -0.01}).startswith("no difference shown: +5.0")
    methods = [method("a", 0.80, 2e6), method("b", 0.75, 9)]
    found = recommend(methods, [far], prefer="trained_parameters")
    assert found == {"method": "a", "reason": "the best mean, and ahead, with one seed, of all others"}


def test_recommend_small_significant_difference_counts() -> None:
    methods = [method("full", 0.800, 22e6), method("lora", 0.795, 3e5)]
    found = recommend(methods, pairs(methods, 0.002), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "full"
    assert "shown to be better than all others" in found["reason"]


def test_recommend_equally_cheap_takes_faster() -> None:
    methods = [
        method("dora", 0.79, 3.1e5, seconds=90),
        method("lora", 0.788, 3.0e5, seconds=60),
        method("full", 0.78, 2e7),
    ]
    found = recommend(methods, pairs(methods, 0.05), prefer="trained_parameters")
    assert found is not None
    assert found["method"] == "lora"


def test_recommend_unmeasured_cost_decides_nothing() -> None:
    methods = [method("full", 0.80, None), method("lora", 0.79, None)]
    found = recommend(methods, pairs(methods, 0.05), prefer="trained_parameters")
    assert found == {"method": "full", "reason": "the best mean; trained parameters could not be measured"}
    assert recommend([], [], prefer="trained_parameters") is None
    with pytest.raises(ConfigError, match="no cost `money`"):
        recommend(methods, [], prefer="money")


def test_at_chance_best_not_above_majority_label() -> None:
    methods = [method("a", 0.55, 10.0), method("b", 0.53, 5.0)]  # intervals of 3 points on either side
    said = at_chance(methods, 0.53, 0.53, "accuracy")
    assert said is not None
    assert said.startswith("no method is shown to be better than always answering the most frequent label (53.0 % of")
    assert at_chance(methods, 0.52, 0.52, "accuracy") is not None  # the end of the interval shows nothing either
    assert at_chance(methods, 0.51, 0.51, "accuracy") is None
    assert at_chance(methods, 0.7, 0.7, "accuracy") is not None  # even worse than that
    alone = at_chance(methods[:1], 0.53, 0.8, "f1_macro")
    assert alone is not None
    assert alone.startswith("a is not shown")
    assert alone.endswith("(80.0 % of the rows), which has a f1 macro of 53.0")
    assert at_chance(methods, None, 0.5, "roc_auc") is None
    assert at_chance([], 0.5, 0.5, "accuracy") is None
