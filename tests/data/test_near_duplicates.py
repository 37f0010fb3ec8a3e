"""Held-out rows that are nearly training rows, and classes of which one outweighs the others."""

from __future__ import annotations

import random

from graftwerk.data.checks import PlacedRows, check_labels
from graftwerk.data.near_duplicates import NEAR, check_near_leakage, shingles

WORDS = [f"w{number}" for number in range(300)]


def rows(texts: list[str]) -> PlacedRows:
    return PlacedRows(texts, None, lambda at: f"f:{at + 1}")


def test_check_near_leakage_row_with_one_changed_word_is_reported() -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away from it into the wood"
    train = rows(["something else that has nothing to do with it at all", text])
    (found,) = check_near_leakage({"train": train, "test": rows([text.replace("wood", "forest"), "a b c d e f"])})
    assert (found.code, found.rows, found.grave) == ("near-leakage", 1, False)
    assert found.example is not None
    assert found.example.startswith("f:2: ")
    assert " and f:1: " in found.example


def test_check_near_leakage_equal_distinct_or_short_texts_give_no_issue() -> None:
    train = rows(["a b c d e f g h", "short one", "one two three four five six seven"])
    held = rows(["A b  c d e f g h", "short two", "one two three other words come here"])
    assert check_near_leakage({"train": train, "validation": held}) == ()


def test_shingles_returns_all_word_trigrams() -> None:
    assert shingles("A b, c d") == {"a b c", "b c d"}
    assert shingles("a b c") == {"a b c"}
    assert shingles("a b") == set()


def test_check_near_leakage_finds_every_near_pair() -> None:
    draw = random.Random(0)
    train = [" ".join(draw.choices(WORDS, k=20)) for _ in range(150)]
    held = []
    for text in train[:60]:
        words = text.split()
        for _ in range(draw.randrange(1, 4)):
            words[draw.randrange(len(words))] = "other"
        held.append(" ".join(words))

    def alike(one: str, other: str) -> float:
        return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))

    wanted = sum(any(alike(one, other) >= NEAR for other in train) for one in held)
    assert 0 < wanted < 60
    (found,) = check_near_leakage({"train": rows(train), "test": rows(held)})
    assert found.rows == wanted


def test_check_labels_skew_is_reported_and_extreme_skew_is_severe() -> None:
    def said(most: int) -> list[tuple[str, bool]]:
        labels = ["a"] * most + ["b"] * 2
        _, findings = check_labels({"train": labels}, None, "f")
        return [(finding.code, finding.grave) for finding in findings]

    assert said(17) == []
    assert said(18) == [("label-skew", False)]
    assert said(198) == [("label-skew", True)]


def test_check_near_leakage_finds_a_pair_that_shares_just_enough_of_its_last_shingles() -> None:
    words = [f"b{number:02}" for number in range(12)]  # ten shingles; the last seven are all that the other text has
    held = rows([" ".join(words)])
    (found,) = check_near_leakage({"train": rows([" ".join(words[3:])]), "test": held})
    assert found.rows == 1
    assert check_near_leakage({"train": rows([" ".join(words[4:])]), "test": held}) == ()
