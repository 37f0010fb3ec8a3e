"""What is not used of what a model wrote."""

from __future__ import annotations

import pytest

from graftwerk.augmentation.filters import REASONS, fault, loops


@pytest.mark.parametrize(
    ("written", "ended", "reason"),
    [
        ("Eine gute Antwort.", True, None),
        ("", True, "empty"),
        (" \n", True, "empty"),
        ("Eine gute", False, "too_long"),
        ("THE  text", True, "copied"),
        ("y y y y y", True, "looping"),
        ("von der Liste von der Liste von der Liste von der Liste", True, "looping"),
        ("sehr sehr sehr gut", True, None),
    ],
)
def test_fault_names_reason_of_bad_output(written: str, ended: bool, reason: str | None) -> None:
    found = fault(written, "the text", ended=ended)
    assert found == reason
    assert found is None or found in REASONS


def test_loops_finds_repetition_anywhere() -> None:
    assert loops("well then a b a b a b a b and so on")
    assert not loops("a b a b a b and so on")


def test_loops_finds_up_to_four_words_repeated_four_times() -> None:
    assert loops("a b c d " * 4)
    assert not loops("a b c d " * 3 + "a b c")
    assert not loops("a b c d e " * 4), "longer ones are left to the reader"
