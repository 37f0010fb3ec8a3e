"""Sums of weight updates, with the names of those who found them; nothing here knows models or files.

An update is the matrix that an adapter adds to a weight, (out, in). Its factors are B (out, R) and A (R, in) with the
update B A, all scales included. Sums of factored updates are exact: the factors of the parts side by side,

    w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2]

where averaging A and B apart would add the cross terms B1 A2 and B2 A1. A product of R x R, not of the whole matrix,
gives the best update of a lower rank (`reduced`).

* TIES: Yadav et al. 2023, arXiv:2306.01708: keep the largest entries of each update, elect a sign for each place by the
  sum, average those that agree.
* DARE: Yu et al. 2023, arXiv:2311.03099: drop entries at random, scale the others up.
* DELLA: Deep et al. 2024, arXiv:2406.11617: as DARE, but small entries of a row are dropped more often; then signs are
  elected as in TIES.

Legend: R rank of a sum, D density (share of the entries that are kept), w weight of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from graftwerk.modeling.weight_updates import Factors

By = Literal["linear", "cat", "svd", "ties", "dare", "della"]
ROUNDING = 1e-7
"""Singular values below this share of the largest are rounding errors of the stored factors, which are float32."""
SPREAD = 0.2
"""DELLA: difference between the largest and the smallest probability of dropping an entry of a row."""


def side_by_side(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the exact weighted sum of factored updates.

    Args:
        parts: B (out, r_i) and A (r_i, in) of each.
        weights: The weight of each.

    Returns:
        B (out, R) and A (R, in), R the sum of the ranks.

    Example:
        >>> b, a = torch.ones(2, 1), torch.ones(1, 3)
        >>> b, a = side_by_side([(b, a), (b, a)], [2.0, -1.0])
        >>> (b @ a).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    b = torch.cat([weight * b for weight, (b, _) in zip(weights, parts, strict=True)], dim=1)  # (out, R)
    return b, torch.cat([a for _, a in parts], dim=0)  # (R, in)


def reduced(factors: Factors, rank: int | None) -> tuple[Factors, float, float]:
    """Return the best update of a rank, or all of it in as few dimensions as it has.

    B = Q S and A^T = P T, so that the singular values of B A are those of the small S T^T.

    Args:
        factors: B (out, R) and A (R, in).
        rank: Most dimensions to keep; None for all above `ROUNDING`.

    Returns:
        B (out, r) and A (r, in) with equal norms, r at least 1; the norm of what is left out, and that of the update.

    Example:
        >>> (b, a), left_out, norm = reduced((torch.eye(3) * torch.tensor([2.0, 1.0, 0.0]), torch.eye(3)), rank=1)
        >>> tuple(b.shape), tuple(a.shape), left_out, round(norm ** 2)
        ((3, 1), (1, 3), 1.0, 5)
    """
    q, s = torch.linalg.qr(factors[0])  # (out, k), (k, R)
    p, t = torch.linalg.qr(factors[1].T)  # (in, l), (l, R)
    left, values, right = torch.linalg.svd(s @ t.T, full_matrices=False)
    return _truncated(q @ left, values, right @ p.T, rank)


def factored(update: Tensor, rank: int | None) -> tuple[Factors, float, float]:
    """Return the factors of an update, (out, in), as `reduced` does of a factored one."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return _truncated(left, values, right, rank)


def _truncated(left: Tensor, values: Tensor, right: Tensor, rank: int | None) -> tuple[Factors, float, float]:
    count = int((values > ROUNDING * values.max().clamp_min(1e-30)).sum())
    count = max(1, count if rank is None else min(rank, count))
    root = values[:count].sqrt()
    factors = left[:, :count] * root, root[:, None] * right[:count]
    return factors, float(values[count:].norm()), float(values.norm())


def trimmed(update: Tensor, density: float) -> Tensor:
    """Return an update, (out, in), with all but its largest entries zero: the share ``density`` of them is kept."""
    count = max(1, round(density * update.numel()))
    places = update.abs().flatten().topk(count).indices
    kept = torch.zeros_like(update).flatten()
    kept[places] = update.flatten()[places]
    return kept.view_as(update)


def agreeing_mean(updates: Sequence[Tensor]) -> Tensor:
    """Return the mean, at each place, of the entries that have the sign of the sum, (out, in); zeros do not count."""
    stacked = torch.stack(tuple(updates))  # (parts, out, in)
    sign = stacked.sum(0).sign()
    agrees = (stacked.sign() == sign) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def dropped(update: Tensor, probability: Tensor | float, generator: torch.Generator) -> Tensor:
    """Return an update, (out, in), with entries dropped at random and the others scaled up, so that its mean stays.

    Args:
        update: (out, in).
        probability: Of dropping an entry: one for all, or (out, in).
        generator: The random numbers, on the CPU.
    """
    keep = 1 - torch.as_tensor(probability, dtype=update.dtype, device=update.device).expand_as(update)
    drawn = torch.rand(update.shape, generator=generator, dtype=update.dtype, device="cpu").to(update.device)
    return torch.where(drawn < keep, update / keep, 0.0)


def by_size(update: Tensor, density: float) -> Tensor:
    """Return DELLA's probabilities of dropping, (out, in): the smallest entry of a row is dropped most often."""
    spread = min(SPREAD, 2 * density, 2 * (1 - density))
    order = update.abs().argsort(dim=1).argsort(dim=1).to(update.dtype)  # 0 for the smallest of a row
    places = max(1, update.shape[1] - 1)
    return (1 - density) + spread * (0.5 - order / places)


def _ties(updates: Sequence[Tensor], weights: Sequence[float], density: float, _: torch.Generator) -> Tensor:
    return agreeing_mean([weight * trimmed(one, density) for weight, one in zip(weights, updates, strict=True)])


def _dare(updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: torch.Generator) -> Tensor:
    kept = [weight * dropped(one, 1 - density, draws) for weight, one in zip(weights, updates, strict=True)]
    return torch.stack(kept).sum(0)


def _della(updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: torch.Generator) -> Tensor:
    kept = [weight * dropped(one, by_size(one, density), draws) for weight, one in zip(weights, updates, strict=True)]
    return agreeing_mean(kept)


SPARSE: Mapping[str, Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]] = {
    "ties": _ties,
    "dare": _dare,
    "della": _della,
}
"""Ways that leave entries out: updates (out, in), their weights, the density and random numbers -> (out, in)."""
