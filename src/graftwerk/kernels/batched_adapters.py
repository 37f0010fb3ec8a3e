"""Deltas of one kind side by side: every row of a batch meets its own in one batched product.

A batch may name an adapter for each of its rows. Run one adapter after the other, a layer costs as many small products
as there are adapters; stacked along a first dimension, it costs one `bmm` (as in Punica, arXiv:2310.18547, and S-LoRA,
arXiv:2311.03285, which do it in kernels of their own). Smaller ranks are filled up with zeros, which add nothing.

Each method's stacked form stands beside its plain one and gives the same sums, up to rounding.

Legend: S entries (rows of a batch, beams of a row together), M vectors of an entry, i inputs, o outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

One = TypeVar("One")


class BatchedAdapter:
    """S deltas of one kind: `enter` and `leave` as `AdapterModule` has them, on (S, M, i) and (S, M, o).

    Outside autograd ``leave`` may change ``y`` in place: it is the layer's fresh output.
    """

    def pre_forward(self, x: Tensor) -> Tensor:
        return x

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


def stack_padded(deltas: Sequence[One], tensor: Callable[[One], Tensor]) -> Tensor:
    """One tensor of each delta, (S, ...), smaller ones filled up with zeros at their ends; what several entries share
    is made once.
    """
    made = {id(delta): delta for delta in deltas}
    tensors = {key: tensor(delta) for key, delta in made.items()}
    shape = [max(sizes) for sizes in zip(*(one.shape for one in tensors.values()), strict=True)]
    filled = {key: _filled(one, shape) for key, one in tensors.items()}
    return torch.stack([filled[id(delta)] for delta in deltas])


def _filled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    missing = [(0, most - size) for size, most in zip(tensor.shape, shape, strict=True)]
    return F.pad(tensor, [number for pair in reversed(missing) for number in pair])


def per_entry(values: Sequence[float], like: Tensor) -> Tensor:
    """(S, 1, 1): one number for each entry."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def add_bmm(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """y (S, M, o) + low (S, M, r) b (S, r, o)."""
    if y.dtype != b.dtype or torch.is_autocast_enabled(y.device.type):
        return y + torch.bmm(low, b).to(y.dtype)
    return torch.baddbmm(y, low, b) if torch.is_grad_enabled() else y.baddbmm_(low, b)


def low_rank_product(x: Tensor, a: Tensor) -> Tensor:
    """x (S, M, i) a (S, r, i)^T -> (S, M, r)."""
    if x.shape[1] == 1:  # a matrix times a vector: the matrix first, as BLAS wants it
        return torch.bmm(a, x.mT).mT
    return torch.bmm(x, a.mT)
