"""Predictions of several processes, put together in the order of the rows: every kind of answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwerk.tasks.predictions import ClassPredictions, LabelPredictions, Predictions, ScorePredictions
from graftwerk.tasks.tag_predictions import NOBODY, TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions
from graftwerk.training.distributed.predictions import deal_batches, gather_predictions

RNG = np.random.default_rng(0)
N = 11


def tags() -> TagPredictions:
    ids = RNG.integers(0, 3, (N, 7))
    lengths = np.array([7, 3, 2, 1, 5, 2, 2, 1, 1, 2, 1])
    ids[np.arange(7)[None] >= lengths[:, None]] = NOBODY
    return TagPredictions(
        0.0, ids, ids, RNG.random((N, 7)), np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7]), ("B-X", "I-X", "O")
    )


KINDS: dict[str, Callable[[], Predictions]] = {
    "classes": lambda: ClassPredictions(0.0, RNG.random((N, 3)), RNG.integers(0, 3, N)),
    "scores": lambda: ScorePredictions(0.0, RNG.random(N), RNG.random(N)),
    "labels": lambda: LabelPredictions(0.0, RNG.random((N, N - 5)), RNG.integers(0, 2, (N, N - 5)), RNG.random(N - 5)),
    "tags": tags,
    "vectors": lambda: SimilarityPredictions(0.0, RNG.random((N, 4)), RNG.random((N, 4)), None),
}


def threaded(work: Callable[[Any, int], Predictions]) -> list[Predictions]:
    """Run two processes as threads that meet at every collective call."""
    import threading

    barrier, slots, answers = threading.Barrier(2), [torch.tensor(0)] * 2, [None, None]

    def exchange(rank: int, tensor: Tensor) -> list[Tensor]:
        slots[rank] = tensor
        barrier.wait(10)
        both = [slot.clone() for slot in slots]
        barrier.wait(10)
        return both

    def run(rank: int) -> None:
        process = SimpleNamespace(
            rank=rank,
            world_size=2,
            device=torch.device("cpu"),
            gather=lambda tensor: torch.stack(exchange(rank, tensor)),
            sum=lambda tensor: torch.stack(exchange(rank, tensor)).sum(0),
        )
        answers[rank] = work(process, rank)  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_gather_predictions_gives_all_rows_in_order_and_the_mean_loss(kind: str) -> None:
    whole = KINDS[kind]()
    shares = deal_batches([[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10]], 2)

    def work(process: Any, rank: int) -> Predictions:
        rows = shares[rank]
        part = {
            name: value[rows]
            for name in whole.arrays
            if name not in whole.whole and (value := getattr(whole, name)) is not None
        }
        if isinstance(whole, TagPredictions):  # as wide as this process's own longest row
            width = int((part["tags"] != NOBODY).sum(axis=1).max())
            part = {name: value[:, :width] if value.ndim == 2 else value for name, value in part.items()}
        return gather_predictions(process, replace(whole, loss=1.0 + rank, **part), shares)

    for gathered in threaded(work):
        for name in whole.arrays:
            if getattr(whole, name) is None:
                assert getattr(gathered, name) is None
                continue
            value, expected = getattr(gathered, name), getattr(whole, name)
            if name == "certain":
                value, expected = (np.where(whole.tags == NOBODY, 0, each) for each in (value, expected))  # type: ignore[attr-defined]
            np.testing.assert_array_equal(value, expected)
        first, second = (
            sum((whole.tags[row] >= 0).sum() for row in share) if isinstance(whole, TagPredictions) else len(share)
            for share in shares
        )
        assert gathered.loss == pytest.approx((first + 2 * second) / (first + second))
