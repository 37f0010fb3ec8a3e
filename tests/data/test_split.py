"""Held-out rows: each row on one side, the same on every machine, repeated texts together, classes in proportion."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.split import draw_order, fold, held_out, split_rows
from graftwerk.errors import ConfigError, DataError

labelled = st.lists(
    st.tuples(st.text("abAB ", min_size=1, max_size=4), st.sampled_from("xyz")), min_size=1, max_size=60
)


@given(labelled, st.integers(0, 20), st.integers(0, 20), st.none() | st.integers(1, 30), st.integers(0, 3))
def test_split_rows_partitions_rows_and_groups_equal_texts(
    rows: list[tuple[str, str]], test: int, validation: int, max_train: int | None, seed: int
) -> None:
    texts = [text for text, _ in rows]
    classes = [label for _, label in rows]
    try:
        train, held, last = split_rows(
            texts, classes, test=test, validation=validation, max_train=max_train, split_seed=seed
        )
    except DataError:
        return
    together = train + held + last
    assert len(set(together)) == len(together)
    if max_train is None:
        assert sorted(together) == list(range(len(rows)))
    else:
        assert len(train) <= max_train
    assert len(held) <= validation
    assert len(last) <= test
    sides = [{fold(texts[index]) for index in side} for side in (train, held, last)]
    assert sum(len(side) for side in sides) == len(set.union(*sides))
    for side in (train, held, last):
        assert side == sorted(side)


@pytest.fixture(scope="module")
def rows() -> tuple[list[str], list[str]]:
    texts = [f"text number {at}" for at in range(1000)]
    return texts, ["rare" if at % 10 == 0 else "often" for at in range(1000)]


def test_split_rows_known_seed_gives_recorded_rows() -> None:
    """Written down once: held-out rows of published figures must stay the same rows."""
    texts = [f"row {at}" for at in range(12)]
    assert split_rows(texts, None, test=3, validation=3) == ([0, 1, 3, 5, 7, 8], [2, 10, 11], [4, 6, 9])
    assert split_rows(texts, None, test=3, validation=3, split_seed=1)[1:] != ([2, 10, 11], [4, 6, 9])


def test_split_rows_shuffled_file_holds_out_same_texts(rows: tuple[list[str], list[str]]) -> None:
    texts, classes = rows
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    _, before, _ = split_rows(texts, classes, validation=100)
    _, after, _ = split_rows([texts[at] for at in order], [classes[at] for at in order], validation=100)
    assert {texts[at] for at in before} == {texts[order[at]] for at in after}


def test_split_rows_is_stratified(rows: tuple[list[str], list[str]]) -> None:
    texts, classes = rows
    for seed in range(5):
        train, held, last = split_rows(texts, classes, test=50, validation=100, max_train=200, split_seed=seed)
        counts = [Counter(classes[at] for at in side)["rare"] for side in (train, held, last)]
        assert [len(train), len(held), len(last)] == [200, 100, 50]
        assert counts[0] == pytest.approx(20, abs=1)
        assert counts[1] == pytest.approx(10, abs=1)
        assert counts[2] == pytest.approx(5, abs=1)


def test_split_rows_test_is_stable_and_smaller_train_is_subset(
    rows: tuple[list[str], list[str]],
) -> None:
    texts, classes = rows
    small = split_rows(texts, classes, test=50, validation=20, max_train=100)
    large = split_rows(texts, classes, test=50, validation=20, max_train=300)
    other = split_rows(texts, classes, test=50, validation=200)
    assert set(small[0]) < set(large[0])
    assert small[1] == large[1]
    assert small[2] == large[2] == other[2]


def test_split_rows_added_rows_keep_most_held_out_rows(rows: tuple[list[str], list[str]]) -> None:
    texts, classes = rows
    _, before, _ = split_rows(texts, classes, validation=200)
    _, after, _ = split_rows([*texts, *(f"new {at}" for at in range(50))], [*classes, *["often"] * 50], validation=200)
    assert len(set(before) & set(after)) > 180


def test_split_rows_other_seed_draws_other_rows(rows: tuple[list[str], list[str]]) -> None:
    texts, classes = rows
    first, second = (set(split_rows(texts, classes, validation=200, split_seed=seed)[1]) for seed in (0, 1))
    assert len(first & second) < 80  # 40 by chance


def test_draw_order_groups_texts_equal_up_to_case_and_space() -> None:
    groups = draw_order(["A b", "c", "a  B ", "\tc\n"], ["x", "y", "y", "x"], 0)
    assert sorted(sorted(group) for group in groups) == [[0, 2], [1, 3]]


def test_split_rows_group_larger_than_split_is_skipped() -> None:
    texts = ["same"] * 5 + ["other"]
    train, held, _ = split_rows(texts, None, validation=2)
    assert (train, held) == ([0, 1, 2, 3, 4], [5])


def test_split_rows_nothing_to_hold_out_raises() -> None:
    with pytest.raises(DataError, match="no validation rows"):
        split_rows(["same"] * 5, None, validation=2)
    with pytest.raises(DataError, match="no rows are left"):
        split_rows(["a", "b"], None, validation=2)


@pytest.mark.parametrize(("amount", "count"), [(None, 0), (5, 5), (0.1, 10), (0.001, 1), (99, 99)])
def test_held_out_converts_count_or_share(amount: int | float | None, count: int) -> None:
    assert held_out(amount, 100, "data.validation") == count


@pytest.mark.parametrize("amount", [100, 101, 0.999])
def test_held_out_all_rows_raises(amount: int | float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation"):
        held_out(amount, 100, "data.validation")


def test_split_rows_train_seed_draws_again_below_the_same_test_rows(rows: tuple[list[str], list[str]]) -> None:
    texts, classes = rows
    plain = split_rows(texts, classes, test=50, validation=50, max_train=100)
    drawn = [split_rows(texts, classes, test=50, validation=50, max_train=100, train_seed=seed) for seed in (0, 1, 1)]
    assert [each[2] for each in drawn] == [plain[2]] * 3
    assert drawn[0] == plain  # the split's own seed draws what it always did
    assert drawn[1] == drawn[2]
    assert drawn[1][0] != plain[0]
    assert drawn[1][1] != plain[1]
    for train, validation, test in drawn:
        assert not {*train} & {*validation} | {*train} & {*test} | {*validation} & {*test}
        assert (len(train), len(validation)) == (100, 50)
