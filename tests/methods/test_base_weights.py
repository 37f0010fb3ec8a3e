"""Weights of a base as numbers."""

from __future__ import annotations

import pytest
import torch

from graftwerk.methods.base_weights import all_finite

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 7, 99])
def test_all_finite_finds_one_value_anywhere(dtype: torch.dtype, bad: str, place: int) -> None:
    numbers = torch.linspace(-3, 3, 100).requires_grad_()
    assert all_finite(numbers.to(dtype).view(4, 25).T)
    wrong = numbers.detach().clone()
    wrong[place] = float(bad)
    assert not all_finite(wrong.to(dtype).view(4, 25).T)


@pytest.mark.parametrize("place", [0, 99_999, 199_999])
def test_all_finite_finds_one_value_in_a_large_tensor(place: int) -> None:
    numbers = torch.zeros(200_000)  # which several threads share
    numbers[place] = float("nan")
    assert not all_finite(numbers)


def test_all_finite_takes_the_largest_numbers_integers_and_nothing() -> None:
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.full((10,), largest))
    assert all_finite(torch.tensor([-largest, largest]))
    assert all_finite(torch.arange(3))
    assert all_finite(torch.empty(0, 3))
