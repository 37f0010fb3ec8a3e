"""Noise on the words of a text: dropout, bounded shuffle, insertion.

Sources: word dropout: Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods", and as noise on the
source side Lample et al. 2018, "Unsupervised Machine Translation Using Monolingual Corpora Only", section 2.3, where
the bounded shuffle stands too. Insertion: Wei and Zou 2019, "EDA", puts in synonyms of words of the text; without a
thesaurus, words are drawn by their frequency in the rows, as Xie et al. 2017, "Data Noising as Smoothing", draw
those that take another's place.

A word is what white space separates. Words are joined again by one space each. Where a language is written without
spaces, a text is one word, and no noise is made of it; that is counted.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from graftwerk.augmentation.settings import Noise, WordDropout, WordInsertion, WordShuffle
from graftwerk.data.keyed_rng import chance, fingerprint


@dataclass(frozen=True)
class Vocabulary:
    """The words of a row set with their counts, in an order that does not depend on that of the rows."""

    counts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """Return the vocabulary of texts, whose words are separated by white space."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.split())
        return cls(tuple(sorted(counts.items())))

    def draw(self, draws: random.Random) -> str:
        """Draw a word in proportion to its frequency."""
        return self.counts[bisect_right(self._until, int(draws.random() * self._until[-1]))][0]

    @cached_property
    def _until(self) -> list[int]:
        return list(accumulate(count for _, count in self.counts))

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of words and counts; the order of the texts does not change it."""
        return fingerprint(*(part for pair in self.counts for part in pair))


def drop_words(words: list[str], probability: float, draws: random.Random) -> list[str]:
    """Keep each word with probability ``1 - probability``, and at least one, chosen uniformly."""
    kept = [word for word in words if draws.random() >= probability]
    return kept or [words[int(draws.random() * len(words))]]


def shuffle_words(words: list[str], distance: int, draws: random.Random) -> list[str]:
    """Sort words by ``index + U(0, distance + 1)``, as Lample et al. do.

    A word at i gets a key below i + distance + 1, and every word from there on a key of at least that; so at most
    ``distance`` words from behind come before it, and as many from before behind it: no word moves farther.
    (A key may be rounded up to i + distance + 1; then it ties, and the sort, which is stable, keeps the order.)
    """
    keys = [index + (distance + 1) * draws.random() for index in range(len(words))]
    return [words[index] for index in sorted(range(len(words)), key=lambda index: keys[index])]


def insert_words(words: list[str], probability: float, vocabulary: Vocabulary, draws: random.Random) -> list[str]:
    """Insert a word of the vocabulary after each word, with a probability."""
    made: list[str] = []
    for word in words:
        made.append(word)
        if draws.random() < probability:
            made.append(vocabulary.draw(draws))
    return made


def distort(settings: Noise, text: str, variant: int, vocabulary: Vocabulary | None) -> str:
    """Return one variant of a text, a pure function of settings, text, variant number and vocabulary."""
    words = text.split()
    if not words:
        return text
    draws = chance(settings.seed, settings.name, variant, text)
    if isinstance(settings, WordDropout):
        made = drop_words(words, settings.probability, draws)
    elif isinstance(settings, WordShuffle):
        made = shuffle_words(words, settings.distance, draws)
    else:
        assert isinstance(settings, WordInsertion)
        assert vocabulary is not None
        made = insert_words(words, settings.probability, vocabulary, draws)
    return " ".join(made)


def same_words(one: str, other: str) -> bool:
    """Return True if two texts differ in white space at most."""
    return one.split() == other.split()
