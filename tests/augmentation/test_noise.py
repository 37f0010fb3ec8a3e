"""Noise on words: what each kind may do to a text, and that nothing but the seed and the text decides it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.augmentation.noise import Vocabulary, distort, drop_words, insert_words, same_words, shuffle_words
from graftwerk.augmentation.settings import Noise, WordDropout, WordInsertion, WordShuffle
from graftwerk.data.keyed_rng import chance, fingerprint

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**32)
VOCABULARY = Vocabulary.of(["one two two", "three"])
NOISES: list[Noise] = [WordDropout(probability=0.3), WordShuffle(distance=2), WordInsertion(probability=0.3)]


@given(words=WORDS, distance=st.integers(1, 6), seed=SEEDS)
def test_shuffle_words_moves_no_word_beyond_distance(words: list[str], distance: int, seed: int) -> None:
    marked = [f"{index}" for index in range(len(words))]
    moved = shuffle_words(marked, distance, chance(seed))
    assert sorted(moved) == sorted(marked)
    assert all(abs(int(word) - place) <= distance for place, word in enumerate(moved))


def test_shuffle_words_uses_every_distance_in_both_directions() -> None:
    moves = {
        int(word) - place
        for seed in range(50)
        for place, word in enumerate(shuffle_words([str(index) for index in range(30)], 3, chance(seed)))
    }
    assert moves == {-3, -2, -1, 0, 1, 2, 3}


@given(words=WORDS, probability=st.floats(0.01, 0.99), seed=SEEDS)
def test_drop_words_keeps_order_and_at_least_one_word(words: list[str], probability: float, seed: int) -> None:
    kept = drop_words(words, probability, chance(seed))
    rest = iter(words)
    assert kept
    assert all(word in rest for word in kept), "not a subsequence"


def test_drop_words_drops_requested_share() -> None:
    kept = sum(len(drop_words(["word"] * 100, 0.2, chance(seed))) for seed in range(100))
    assert 7_800 < kept < 8_200


@given(words=WORDS, probability=st.floats(0.01, 0.99), seed=SEEDS)
def test_insert_words_adds_vocabulary_words_and_drops_none(words: list[str], probability: float, seed: int) -> None:
    made = insert_words(words, probability, VOCABULARY, chance(seed))
    rest = iter(made)
    assert all(word in rest for word in words)
    assert set(Counter(made) - Counter(words)) <= {"one", "two", "three"}


def test_insert_words_adds_requested_share() -> None:
    made = sum(len(insert_words(["word"] * 100, 0.2, VOCABULARY, chance(seed))) for seed in range(100))
    assert 11_800 < made < 12_200


def test_vocabulary_draw_follows_word_frequency() -> None:
    draws = chance(0)
    drawn = Counter(VOCABULARY.draw(draws) for _ in range(4_000))
    assert {word: round(count / 1_000) for word, count in drawn.items()} == {"one": 1, "two": 2, "three": 1}


@given(texts=st.lists(st.text("abc ", max_size=20), min_size=1, max_size=8), data=st.data())
def test_vocabulary_is_independent_of_row_order(texts: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(texts))
    assert Vocabulary.of(texts) == Vocabulary.of(other)
    assert Vocabulary.of(texts).fingerprint == Vocabulary.of(other).fingerprint


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
def test_distort_depends_on_seed_text_and_variant(noise: Noise) -> None:
    text = " ".join(f"word{index}" for index in range(30))
    first = distort(noise, text, 0, VOCABULARY)
    assert first == distort(noise, text, 0, VOCABULARY)
    assert first != text
    assert first != distort(noise, text, 1, VOCABULARY)
    assert first != distort(noise.model_copy(update={"seed": 1}), text, 0, VOCABULARY)
    assert distort(noise, "", 0, VOCABULARY) == ""
    assert distort(noise, " \n", 0, VOCABULARY) == " \n"


def test_chance_of_a_key_gives_recorded_numbers() -> None:
    """Files made today must come out the same with the next version of Python, and of ours."""
    assert [round(chance(0, "word_dropout", 0, "a b").random(), 6) for _ in range(2)] == [FIRST, FIRST]
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert len(fingerprint("\ud800")) == 32


FIRST = 0.100252


def test_same_words_ignores_white_space() -> None:
    assert same_words("a  b\n", "a b")
    assert not same_words("a b", "b a")
