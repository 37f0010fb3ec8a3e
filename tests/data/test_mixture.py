"""Draws from several data sets: shares, whole numbers, epochs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.mixture import Sampler, quotas, shares
from graftwerk.training.batch_sampler import epoch_order

SIZES = (90, 9, 1)
SETS = [0] * 90 + [1] * 9 + [2]


@pytest.mark.parametrize(
    ("temperature", "weights", "wanted"),
    [
        (1, (1, 1, 1), (0.90, 0.09, 0.01)),
        (math.inf, (1, 1, 1), (1 / 3, 1 / 3, 1 / 3)),
        (2, (1, 1, 1), (math.sqrt(90) / (math.sqrt(90) + 4), 3 / (math.sqrt(90) + 4), 1 / (math.sqrt(90) + 4))),
        (math.inf, (2, 1, 1), (0.5, 0.25, 0.25)),
        (1, (1, 10, 1), (90 / 181, 90 / 181, 1 / 181)),
    ],
)
def test_shares_follow_size_temperature_and_weight(
    temperature: float, weights: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    assert shares(SIZES, weights, temperature) == pytest.approx(wanted)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 500))
def test_quotas_sum_to_rows_and_differ_by_less_than_one(weights: list[float], rows: int) -> None:
    wanted = [weight / sum(weights) for weight in weights]
    given_rows = quotas(wanted, rows)
    assert sum(given_rows) == rows
    assert all(abs(quota - share * rows) < 1 for quota, share in zip(given_rows, wanted, strict=True))


def test_quotas_give_what_is_left_to_the_largest_remainders() -> None:
    assert quotas([0.5, 0.3, 0.2], 4) == [2, 1, 1]
    assert quotas([0.6, 0.25, 0.15], 10) == [6, 3, 1], "of equal remainders the first"


@pytest.mark.parametrize("temperature", [1, 3, math.inf])
def test_sampler_epoch_matches_shares_to_the_row(temperature: float) -> None:
    sampler = Sampler(SETS, (1, 2, 1), temperature, seed=3)
    for epoch in range(5):
        drawn = Counter(SETS[row] for row in sampler(epoch))
        assert sum(drawn.values()) == 100
        for number, share in enumerate(sampler.shares):
            assert abs(drawn[number] - 100 * share) < 1


def test_sampler_draws_every_row_before_repeating_one() -> None:
    sampler = Sampler(SETS, (1, 1, 1), math.inf, seed=0)
    drawn: Counter[int] = Counter()
    for epoch in range(7):
        drawn.update(sampler(epoch))
        for members in sampler.members:
            times = [drawn[row] for row in members]
            assert max(times) - min(times) <= 1
    assert sampler(0) != sampler(1)  # a large set continues where it stopped


def test_sampler_depends_on_seed_and_epoch_alone() -> None:
    one, same, other = (Sampler(SETS, (1, 1, 1), math.inf, seed=seed) for seed in (0, 0, 1))
    for epoch in range(4):
        one(epoch)
    assert one(2) == same(2) != other(2)


def test_sampler_proportional_epoch_draws_every_row_once() -> None:
    assert sorted(Sampler(SETS, (1, 1, 1), 1, seed=0)(5)) == list(range(100))


@pytest.mark.parametrize("group", [True, False])
def test_epoch_order_holds_the_drawn_rows(group: bool) -> None:
    drawn = Sampler(SETS, (1, 1, 1), math.inf, seed=0)(1)
    lengths = [5 + row % 7 for row in range(100)]
    steps = epoch_order(lengths, 8, seed=0, epoch=1, group=group, drawn=drawn)
    assert Counter(row for step in steps for row in step) == Counter(drawn)
    assert len(steps) == 13
