"""Batches: every row once, rows of like length together, the same for the same seed and epoch."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.batching import length_grouped, shuffled

lengths = st.lists(st.integers(1, 100), max_size=400)


@given(lengths, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
def test_batches_hold_every_index_exactly_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    for batches in (length_grouped(lengths, size, seed, epoch), shuffled(len(lengths), size, seed, epoch)):
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= size for batch in batches)
        # As few batches as there can be: steps are counted before the batches are made.
        assert len(batches) == -(-len(lengths) // size)


@given(lengths, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
def test_length_grouped_first_batch_holds_longest_row(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = length_grouped(lengths, size, seed, epoch)
    if batches:
        assert max(lengths) in [lengths[index] for index in batches[0]]


@pytest.fixture(scope="module")
def snippets() -> list[int]:
    draw = random.Random(0)
    return [max(3, int(draw.gauss(27, 11))) for _ in range(2000)]


def padded(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of the positions computed that are padding."""
    computed = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed


def test_length_grouped_pads_less_than_four_percent(snippets: list[int]) -> None:
    assert padded(snippets, shuffled(len(snippets), 16, 0, 0)) > 0.35
    assert padded(snippets, length_grouped(snippets, 16, 0, 0)) < 0.04


def test_batches_depend_on_seed_and_epoch(snippets: list[int]) -> None:
    for make in (
        lambda seed, epoch: length_grouped(snippets, 16, seed, epoch),
        lambda seed, epoch: shuffled(2000, 16, seed, epoch),
    ):
        assert make(3, 1) == make(3, 1)
        different = [make(0, 0), make(0, 1), make(1, 0)]
        assert different[0] != different[1] != different[2] != different[0]


def test_length_grouped_known_seed_gives_recorded_batches() -> None:
    """Written down once: a run that resumes elsewhere must meet the same batches."""
    assert length_grouped([5, 1, 4, 2, 3, 9, 8], 2, seed=0, epoch=0) == [[6, 5], [3, 4], [1], [2, 0]]


def test_length_grouped_epochs_share_few_batches(snippets: list[int]) -> None:
    first, second = ({frozenset(batch) for batch in length_grouped(snippets, 16, 0, epoch)} for epoch in (0, 1))
    assert len(first & second) <= 2


def test_length_grouped_incomplete_batch_varies_in_length() -> None:
    lengths = list(range(1, 22))
    seen = {max(batch) for epoch in range(30) for batch in length_grouped(lengths, 4, 0, epoch) if len(batch) == 1}
    assert len(seen) > 2


def test_batches_of_size_zero_raise() -> None:
    for make in (lambda: length_grouped([1], 0, 0, 0), lambda: shuffled(1, 0, 0, 0)):
        with pytest.raises(ValueError, match="batch_size"):
            make()
