"""Which differences make another run of it."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.training.resume_check import differences


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {"target_parameters": None}, []),  # a setting of a newer version, which is off
        ({}, {"target_parameters": ["x"]}, ["method.target_parameters: (missing) -> ['x']"]),
        ({"r": 8}, {}, ["method.r: 8 -> (missing)"]),
        ({"r": 8}, {"r": None}, ["method.r: 8 -> None"]),
        ({"r": None}, {"r": 8}, ["method.r: None -> 8"]),
        ({"r": 8}, {"r": 8}, []),
    ],
)
def test_differences_of_settings_are_named(before: dict[str, Any], now: dict[str, Any], expected: list[str]) -> None:
    assert differences({"config": {"method": before}}, {"config": {"method": now}}) == expected
