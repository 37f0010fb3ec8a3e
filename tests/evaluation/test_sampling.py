"""A token drawn with a row's own number is a token of the model's distribution, whatever rows stand beside it."""

from __future__ import annotations

from typing import Any

import torch

from graftwerk.data.keyed_rng import chance
from graftwerk.evaluation.sampling import OwnDraws

LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()


def drawn(rows: int, **options: Any) -> torch.Tensor:
    own = OwnDraws([chance(row) for row in range(rows)], **options)
    scores = own(torch.zeros(rows, 1, dtype=torch.long), LOGITS.expand(rows, -1))
    assert (scores == 0).sum(-1).eq(1).all()
    assert (scores.isinf().sum(-1) == 4).all()
    return scores.argmax(-1)


def shares(tokens: torch.Tensor) -> list[float]:
    return (tokens.bincount(minlength=5) / len(tokens)).tolist()


def near(found: list[float], wanted: list[float]) -> bool:
    return all(abs(one - other) < 0.02 for one, other in zip(found, wanted, strict=True))


def test_own_draws_follow_token_probabilities() -> None:
    assert near(shares(drawn(5_000)), [0.1, 0.5, 0.2, 0.15, 0.05])


def test_own_draws_temperature_sharpens_distribution() -> None:
    squared = torch.tensor([0.01, 0.25, 0.04, 0.0225, 0.0025])
    assert near(shares(drawn(5_000, temperature=0.5)), (squared / squared.sum()).tolist())


def test_own_draws_top_p_keeps_smallest_nucleus() -> None:
    assert near(shares(drawn(5_000, top_p=0.75)), [0, 0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0])
    assert set(drawn(500, top_p=0.01).tolist()) == {1}


def test_top_k_leaves_the_likeliest_and_top_p_counts_among_them() -> None:
    assert near(shares(drawn(5_000, top_k=2)), [0, 0.5 / 0.7, 0.2 / 0.7, 0, 0])
    assert set(drawn(500, top_k=2, top_p=0.7).tolist()) == {1}  # 0.5 of 0.7
    assert drawn(100, top_k=9).tolist() == drawn(100).tolist()


def test_own_draws_row_is_independent_of_batch() -> None:
    assert drawn(50).tolist() == drawn(200).tolist()[:50]


def test_own_draws_masked_tokens_are_never_drawn() -> None:
    scores = torch.full((1, 5), -torch.inf)
    scores[0, 3] = 1.0
    for seed in range(20):
        assert OwnDraws([chance(seed)])(torch.zeros(1, 1), scores).argmax() == 3
