"""Dropout whose mask is a function of a seed, so that it can be drawn again instead of being stored.

    dropout(x)[n, i] = x[n, i] * keep[n, i] / (1 - p)

On a CPU        keep[n, i] = [hash(a[n] * b[i]) < (1 - p) 2^32]

a (rows) and b (columns) are random odd 32-bit numbers from a generator on the tensor's device, seeded anew for each
mask; the hash is the xorshift and multiplication of the usual integer finalizers. A mask therefore costs as many random
numbers as it has rows and columns, and seven passes of 32-bit integer arithmetic: on a CPU a tenth of
`torch.bernoulli`. P(drop) is p to 2^-31; rows and columns are no more alike than those of independent draws, nor do the
corners of a rectangle determine each other (measured in tests/kernels/test_fused_lora.py).

Elsewhere       keep[n, i] ~ Bernoulli(1 - p)

from a generator on the device, seeded for this mask, in one kernel that writes a byte an element: an accelerator's
counter-based generators are as fast as its memory, which the seven passes would wait for.

A graph of torch.compile draws torch's own masks, from the same generators' states.

Legend: N rows times tokens, i width.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.methods.base import AdapterModule

_HASH = -2048144789


def is_hashed(device: torch.device) -> bool:
    """Return True if masks on this device are hashed, and False if its own generator draws them."""
    return device.type == "cpu"


def mask_bits(seed: int, p: float, rows: int, width: int, device: torch.device) -> Tensor:
    """Draw a mask: all bits set where an entry is kept, none where it is dropped; as bytes if it is not hashed.

    Args:
        seed: Seed of the mask.
        p: Probability of dropping an entry.
        rows: N, rows times tokens.
        width: i, entries of a row.
        device: Where the mask is drawn.

    Returns:
        (N, i), int32, or bool if it is not hashed.

    Example:
        >>> mask_bits(0, 0.5, 2, 3, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    if not is_hashed(device):
        return torch.empty(rows, width, dtype=torch.bool, device=device).bernoulli_(1 - p, generator=generator)
    words = torch.empty(rows + width, dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31 - 1, generator=generator).bitwise_or_(1)  # (N + i,)
    bits = words[:rows, None] * words[None, rows:]  # (N, i)
    bits.bitwise_xor_(bits >> 15).mul_(_HASH)
    # The upper bits decide. Halved, they are compared by a difference that cannot overflow, whose sign, spread over all
    # bits, is the mask: comparisons take several times as long as arithmetic, tensors of bool longer still.
    return bits.bitwise_right_shift_(1).sub_(round((0.5 - p) * 2**31)).bitwise_right_shift_(31)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Drop entries of ``x`` and scale the rest; autograd stores the mask.

    Args:
        x: (..., i), floating point.
        p: Probability of dropping an entry, 0 <= p < 1.
        seed: Seed of the mask.

    Returns:
        (..., i), of x's dtype.

    Example:
        >>> bool((dropout(torch.ones(4, 4), 0.5, seed=0) == dropout(torch.ones(4, 4), 0.5, seed=0)).all())
        True
    """
    keep = mask_bits(seed, p, x.numel() // x.shape[-1], x.shape[-1], x.device).view(x.shape)  # (..., i)
    if keep.dtype != torch.bool:
        keep = (keep != 0).to(x.dtype)
    return x * keep * (1 / (1 - p))


class DropoutGroup:
    """Modules that may read one tensor and then drop the same of its entries, so that one mask serves them all.

    The query, key and value projections of an attention read the same hidden states; so do the gate and up projections
    of a feed-forward block. Compared by identity.

    Example:
        >>> group, x = DropoutGroup(), torch.zeros(2)
        >>> group.seed(x, reader="query") == group.seed(x, reader="key")
        True
    """

    __slots__ = ("__weakref__", "_input", "_readers", "_seed")

    def __init__(self) -> None:
        self._input: ref[Tensor] | None = None
        self._seed = 0
        self._readers: set[int] = set()

    def seed(self, x: Tensor, reader: Any) -> int:
        """Return the seed of the mask with which ``reader`` reads ``x``, drawn by the first of the group.

        A reader that comes again (a layer used twice, a forward pass repeated by gradient checkpointing) draws anew, so
        that a repeated pass, which starts from the same generator state, draws the same.

        Args:
            x: The tensor that is read, any shape.
            reader: The module that reads it.

        Returns:
            A seed for `mask_bits`, from torch's CPU generator.
        """
        if self._input is None or self._input() is not x or id(reader) in self._readers:
            # From the CPU's generator wherever the tensor lives: the number is needed here, and nothing has to wait.
            self._input, self._seed, self._readers = ref(x), draw_seed(), set()
        self._readers.add(id(reader))
        return self._seed

    def __reduce__(self) -> tuple[type[DropoutGroup], tuple[()]]:
        return DropoutGroup, ()  # what a copy has read is its own


def draw_seed() -> int:
    """Draw a seed from torch's CPU generator, as a real number also where tensors are fake."""
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            return int(torch.randint(2**62, (), device="cpu"))
    return int(torch.randint(2**62, (), device="cpu"))


class InputDropout(AdapterModule):
    """Abstract: an adapter module whose update reads its input with entries dropped while training.

    Args:
        p: Probability of dropping an entry.
    """

    dropout: float
    group: DropoutGroup

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.__dict__.update(dropout=p, group=DropoutGroup())  # past `__setattr__`, as in `low_rank.Factor`

    @property
    def p(self) -> float:
        """Probability of dropping an entry now: 0 outside training."""
        return self.dropout if self.training else 0.0

    def seed(self, x: Tensor) -> int:
        """Return the seed of the mask on ``x`` (..., in), the same for all modules of the group."""
        return self.group.seed(x, self)

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x (..., in) as the update reads it: in the dtype of the parameters, entries dropped while training."""
        h = x.to(dtype)
        if self.p and torch.compiler.is_compiling():
            return F.dropout(h, self.p)  # no seed can be read inside a graph, whose compiler fuses torch's own mask
        return dropout(h, self.p, self.seed(x)) if self.p else h
