"""Updates that an adapter learnt, layer by layer: size, spectrum, and their place in the base's weight.

* effective rank: Roy and Vetterli 2007, "The effective rank": exp of the entropy of the singular values' shares; r
  for r equal values, near 1 if one stands for all.
* main directions: the share of the update's squared norm within the span of the base's largest singular vectors, a
  tenth of the smaller side, on both sides; and the share that a random matrix has there, k^2 / (out in). After Hu et
  al. 2021, arXiv:2106.09685, section 7.3, who found LoRA to amplify directions that the base does not emphasize.

Legend: W base weight (out, in), D update (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwerk.methods.base import AdapterModule, base_weight
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.module_index import base_modules
from graftwerk.modeling.weight_updates import factors_of, rank_of, update_of, updated_layers

MAIN = 0.1
"""Share of the base's singular directions that are its main ones."""
SHOWN = 16
"""Singular values that are kept of each update."""
WIDEST = 2048
"""Matrices whose smaller side is above this are not decomposed for their main directions: that takes minutes each."""


@dataclass(frozen=True)
class UpdateSpectrum:
    """The update of one layer.

    Attributes:
        name: Path of the layer.
        norm: Frobenius norm of D.
        share: That over the norm of W.
        rank: Rank it is stored with, or None for one that is stored otherwise.
        effective_rank: In how many directions it acts.
        singular_values: The largest, in descending order.
        in_main_directions: Share of its squared norm in the main directions of W, 0 to 1; None for wide matrices.
        by_chance: The share that a random matrix has there.
        similarity: Cosine with the other adapter's update of the layer, -1 to 1; None without one.
    """

    name: str
    norm: float
    share: float
    rank: int | None
    effective_rank: float
    singular_values: list[float]
    in_main_directions: float | None
    by_chance: float
    similarity: float | None = None


@torch.no_grad()
def spectra(
    adapter: Adapter, other: Adapter | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[UpdateSpectrum]:
    """Yield the spectrum of each layer's update; one layer's matrices are in memory at a time.

    Args:
        adapter: The adapter, on its base.
        other: Another adapter on the same base, to compare with.
        on_progress: Called with (layers done, layers in all).

    Raises:
        UnsupportedError: The adapter, or the other one, is no update of weights.
    """
    base = base_modules(adapter.model)
    layers = list(updated_layers(adapter))
    others = {} if other is None else dict(updated_layers(other))
    for done, (path, module) in enumerate(layers, start=1):
        yield _spectrum(path, base[path], module, others.get(path))
        if on_progress is not None:
            on_progress(done, len(layers))


def _spectrum(path: str, layer: nn.Module, module: AdapterModule, other: AdapterModule | None) -> UpdateSpectrum:
    weight, update = base_weight(layer).double(), update_of(path, layer, module)
    values = _singular_values(module, update)
    norm = float(values.norm())
    return UpdateSpectrum(
        name=path,
        norm=norm,
        share=norm / float(weight.norm().clamp_min(1e-30)),
        rank=rank_of(module),
        effective_rank=effective_rank(values),
        singular_values=values[:SHOWN].tolist(),
        in_main_directions=_in_main_directions(update, weight),
        by_chance=_main(weight) ** 2 / weight.numel(),
        similarity=None if other is None else _cosine(update, update_of(path, layer, other)),
    )


def _singular_values(module: AdapterModule, update: Tensor) -> Tensor:
    """Return the singular values of an update, (out, in), in descending order: of its factors where it has them."""
    if rank_of(module) is None:
        whole: Tensor = torch.linalg.svdvals(update)
        return whole
    b, a = factors_of(module)
    s, t = torch.linalg.qr(b)[1], torch.linalg.qr(a.T)[1]  # (r, r) each: B = Q S, A^T = P T
    values: Tensor = torch.linalg.svdvals(s @ t.T)
    return values


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of a matrix with these singular values, (n,); 0 if all are 0.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0])), 6)
        3.0
    """
    total = values.sum()
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def _main(weight: Tensor) -> int:
    """Return the number of main directions of a weight, (out, in)."""
    return max(1, round(MAIN * min(weight.shape)))


def _in_main_directions(update: Tensor, weight: Tensor) -> float | None:
    """Return the share of an update's squared norm in the base's main directions, both (out, in)."""
    norm, count = float(update.norm()), _main(weight)
    if min(weight.shape) > WIDEST or not norm:
        return None
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    inside = left[:, :count].T @ update @ right[:count].T  # (count, count)
    return float(inside.norm() / norm) ** 2


def _cosine(one: Tensor, other: Tensor) -> float | None:
    """Return the cosine of two updates, (out, in), or None if one of them is 0."""
    norms = float(one.norm() * other.norm())
    return float((one * other).sum()) / norms if norms else None
