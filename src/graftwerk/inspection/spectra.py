"""Updates that an adapter learnt, layer by layer: size, spectrum, and their place in the base's weight.

* effective rank: Roy and Vetterli 2007, "The effective rank": exp of the entropy of the singular values' shares; r
  for r equal values, near 1 if one stands for all.
* main directions: the share of the update's squared norm within the span of the base's largest singular vectors, a
  tenth of the smaller side, on both sides; and the share that a random matrix has there, k^2 / (out in). After Hu et
  al. 2021, arXiv:2106.09685, section 7.3, who found LoRA to amplify directions that the base does not emphasize.

Legend: W base weight (out, in), D update (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwerk.methods.base import AdapterModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.module_index import base_modules
from graftwerk.modeling.weight_updates import factors_of, rank_of, update_of, updated_layers

MAIN = 0.1
"""Share of the base's singular directions that are its main ones."""
SHOWN = 16
"""Singular values that are kept of each update."""
WIDEST = 2048
"""Matrices whose smaller side is above this are not decomposed for their main directions: that takes minutes each."""
PIECE = 2**22
"""Entries of a weight that are in memory in float64 at once."""


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
    """Yield the spectrum of each layer's update; what is in memory is of one layer.

    Of updates in factors, LoRA's, nothing as large as the weight is formed: a slice of it in float64, and a square
    matrix of its smaller side if that is decomposed. Other updates are formed, and decomposed as they are.

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
    weight, update = base_weight(layer), _Update.of(path, layer, module)
    second = None if other is None else _Update.of(path, layer, other)
    values = update.singular_values()
    norm, size = float(values.norm()), _norm(weight)
    return UpdateSpectrum(
        name=path,
        norm=norm,
        share=norm / max(size, 1e-30),
        rank=rank_of(module),
        effective_rank=effective_rank(values),
        singular_values=values[:SHOWN].tolist(),
        in_main_directions=_in_main_directions(update, norm, weight),
        by_chance=_main(weight) ** 2 / weight.numel(),
        similarity=None if second is None else _cosine(update, second),
    )


@dataclass(frozen=True)
class _Update:
    """An update as a product, D = B A: of its factors where it has them, so that D itself, (out, in), is never formed.

    Attributes:
        b: B, (out, r); of an update without factors D itself.
        a: A, (r, in), or None for the identity.
    """

    b: Tensor
    a: Tensor | None

    @classmethod
    def of(cls, path: str, layer: nn.Module, module: AdapterModule) -> _Update:
        """Return the update of a layer by a module."""
        if rank_of(module) is None:
            return cls(update_of(path, layer, module), None)
        return cls(*factors_of(module))

    def singular_values(self) -> Tensor:
        """Return the singular values, (r,), in descending order."""
        inner = self.b
        if self.a is not None:
            s, t = torch.linalg.qr(self.b)[1], torch.linalg.qr(self.a.T)[1]  # (r, r) each: B = Q S, A^T = P T
            inner = s @ t.T
        values: Tensor = torch.linalg.svdvals(inner)
        return values

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left^T D right, (k, k), of left (out, k) and right (in, k)."""
        return (left.T @ self.b) @ (right if self.a is None else self.a @ right)

    def dot(self, other: _Update) -> float:
        """Return the sum of the products of two updates' entries."""
        if self.a is None and other.a is None:
            return float((self.b * other.b).sum())
        if self.a is None:
            return other.dot(self)
        towards = other.b if other.a is None else other.b @ (other.a @ self.a.T)  # D' A^T where it is small
        if other.a is None:
            towards = towards @ self.a.T  # (out, r)
        return float((self.b * towards).sum())


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


def _slices(weight: Tensor) -> Iterator[Tensor]:
    """Yield a weight, (out, in), in float64, some of the longer side at a time."""
    side = int(weight.shape[1] >= weight.shape[0])
    return (part.double() for part in torch.split(weight, max(1, PIECE // weight.shape[1 - side]), dim=side))


def _norm(weight: Tensor) -> float:
    """Return the Frobenius norm of a weight, (out, in)."""
    return math.sqrt(sum(float((part * part).sum()) for part in _slices(weight)))


def _in_main_directions(update: _Update, norm: float, weight: Tensor) -> float | None:
    """Return the share of an update's squared norm in the base's main directions, W (out, in).

    The directions of the smaller side are eigenvectors of W W^T (or W^T W), which is summed up slice by slice; those of
    the other side are W^T U / s.
    """
    if min(weight.shape) > WIDEST or not norm:
        return None
    wide = weight.shape[1] >= weight.shape[0]
    squares = weight.new_zeros(min(weight.shape), min(weight.shape), dtype=torch.float64)
    for part in _slices(weight):
        squares += part @ part.T if wide else part.T @ part
    near = torch.linalg.eigh(squares)[1][:, -_main(weight) :]  # (smaller side, k)
    far = torch.cat([part.T @ near if wide else part @ near for part in _slices(weight)])  # (longer side, k)
    far = far / far.norm(dim=0).clamp_min(1e-30)
    inside = update.between(near, far) if wide else update.between(far, near)  # (k, k)
    return float(inside.norm() / norm) ** 2


def _cosine(one: _Update, other: _Update) -> float | None:
    """Return the cosine of two updates, or None if one of them is 0."""
    norms = math.sqrt(one.dot(one) * other.dot(other))
    return one.dot(other) / norms if norms else None
