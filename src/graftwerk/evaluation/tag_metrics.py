"""F1 of entities as seqeval counts them, and accuracy of words.

An entity is right if its words and its kind are. Micro figures count entities of all kinds together; macro F1 is the
mean over the kinds that are there or were found. Legend: R draws, n rows, K kinds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graftwerk.evaluation.bootstrap import Floats, Statistic, share
from graftwerk.tasks.spans import spans_of
from graftwerk.tasks.tag_predictions import TagPredictions


def entity_f1(predictions: TagPredictions) -> Statistic:
    """Return F1 over the entities of all rows, 0 to 1, over bootstrap weights (R, n)."""
    return _micro(predictions, lambda right, found, there: share(2 * right, found + there))


def precision(predictions: TagPredictions) -> Statistic:
    """Return the share of found entities that are right, over weights (R, n); 0 if none was found."""
    return _micro(predictions, lambda right, found, there: share(right, found))


def recall(predictions: TagPredictions) -> Statistic:
    """Return the share of entities that were found, over weights (R, n); 0 if there is none."""
    return _micro(predictions, lambda right, found, there: share(right, there))


def macro_f1(predictions: TagPredictions) -> Statistic:
    """Return the mean F1 over the kinds of entities, over weights (R, n)."""
    _, (right, found, there) = counts_by_kind(predictions)  # (n, K)

    def statistic(weights: Floats) -> Floats:
        seen = weights @ found + weights @ there  # (R, K)
        f1, kinds = share(2 * (weights @ right), seen), (seen > 0).sum(axis=1)
        return share(f1.sum(axis=1), kinds)

    return statistic


def word_accuracy(predictions: TagPredictions) -> Statistic:
    """Return the share of words with the right tag, over weights (R, n)."""
    pairs = list(zip(predictions.tag_names, predictions.target_names, strict=True))
    right = np.array([sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs], dtype=np.float64)  # (n,)
    words = np.array([len(tags) for tags, _ in pairs], dtype=np.float64)
    return lambda weights: share(weights @ right, weights @ words)


def _micro(predictions: TagPredictions, figure: Callable[[Floats, Floats, Floats], Floats]) -> Statistic:
    right, found, there = (counts.sum(axis=1) for counts in counts_by_kind(predictions)[1])  # (n,)
    return lambda weights: figure(weights @ right, weights @ found, weights @ there)


def counts_by_kind(predictions: TagPredictions) -> tuple[list[str], tuple[Floats, Floats, Floats]]:
    """Return the K kinds, and the number of right, found and true entities of each row and kind, each (n, K)."""
    plain = predictions.plain
    kinds = sorted({tag if plain else tag[2:] for tag in predictions.labels})
    columns = {kind: at for at, kind in enumerate(kinds)}
    counts = np.zeros((3, predictions.rows, len(columns)))
    for row, (tags, targets) in enumerate(zip(predictions.tag_names, predictions.target_names, strict=True)):
        found, there = set(spans_of(tags, plain=plain)), set(spans_of(targets, plain=plain))
        for number, spans in enumerate((found & there, found, there)):
            for _, _, kind in spans:
                counts[number, row, columns[kind]] += 1
    return kinds, (counts[0], counts[1], counts[2])
