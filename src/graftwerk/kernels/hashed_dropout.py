"""Dropout whose mask is never kept: backward draws it again from its seed.

    dropped(x) = x * keep / (1 - p)        keep[n, i] = [hash(a[n] * b[i]) < (1 - p) 2^32]

a (rows) and b (columns) are random odd 32-bit numbers from a generator on the tensor's device, seeded anew for each
mask; the hash is the xorshift and multiplication of the usual integer finalizers. So a mask costs as many random
numbers as it has rows and columns, and seven passes of 32-bit integer arithmetic: on a CPU a tenth of
`torch.bernoulli`. P(drop) is p to 2^-31; rows and columns are no more alike than those of independent draws, nor do
corners of rectangles determine each other, which tests/kernels/test_fused_lora.py measures. Legend: N rows times tokens, i
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HASH = -2048144789
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of the same size as a floating type, by bytes."""


def mask_bits(seed: int, p: float, rows: int, width: int, device: torch.device) -> Tensor:
    """(N, i) int32: all bits set where an entry is kept, none where it is dropped."""
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty(rows + width, dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31 - 1, generator=generator).bitwise_or_(1)
    bits = words[:rows, None] * words[None, rows:]
    bits.bitwise_xor_(bits >> 15).mul_(_HASH)
    # The upper bits decide. Halved, it is compared by a difference that cannot overflow, whose sign, spread
    # over all bits, is the mask: comparisons take several times as long as arithmetic, tensors of bool longer still.
    return bits.bitwise_right_shift_(1).sub_(round((0.5 - p) * 2**31)).bitwise_right_shift_(31)


def apply_mask(x: Tensor, bits: Tensor) -> Tensor:
    """(N, i) of any floating type: ``x`` where kept, else 0. Without gradients, not scaled."""
    word = _WORDS[x.element_size()]
    return (x.view(word) & bits.to(word)).view(x.dtype)


def apply_mask_(x: Tensor, bits: Tensor) -> Tensor:
    """`kept`, in place."""
    word = _WORDS[x.element_size()]
    x.view(word).bitwise_and_(bits.to(word))
    return x


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """The plain path: (..., i), scaled, with gradients by autograd, which keeps the mask."""
    keep = mask_bits(seed, p, x.numel() // x.shape[-1], x.shape[-1], x.device).view(x.shape)
    return x * (keep != 0).to(x.dtype) * (1 / (1 - p))
