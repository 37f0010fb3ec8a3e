"""Adapters of one kind side by side: every row of a batch uses its own in one batched product.

A batch may name an adapter for each of its rows. Run one adapter after the other, a layer costs as many small products
as there are adapters; stacked along a first dimension, it costs one `bmm` (as in Punica, arXiv:2310.18547, and S-LoRA,
arXiv:2311.03285, which do it in kernels of their own). Smaller ranks are padded with zeros, which add nothing. The
batched form gives the sums of the plain one, up to rounding, and gradients flow through it to the adapters' parameters.

Legend: S entries (rows of a batch, beams of a row together), M vectors of an entry, i inputs, o outputs, r rank, m
bottleneck width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.kernels.versioned_cache import lies_in
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.bitfit import BitFitModule
from graftwerk.methods.bottleneck import BottleneckNetwork, InputTap, ParallelAdapter, SequentialAdapter
from graftwerk.methods.dora import DoRAModule
from graftwerk.methods.ia3 import IA3Module
from graftwerk.methods.low_rank import LowRankModule
from graftwerk.methods.pissa import PiSSAModule

One = TypeVar("One")


class BatchedAdapter:
    """S adapter modules of one kind: `pre_forward` and `post_forward` as `AdapterModule` has them, on (S, M, ·).

    Outside autograd ``post_forward`` may change ``y`` in place: it is the layer's fresh output. The class methods say
    which single modules can be batched together; ``__init__`` takes those, one for each entry, perhaps the same one
    several times, and their scales if this kind has any.
    """

    def __init__(self, modules: Sequence[Any], scales: Tensor) -> None:
        """Stack the tensors of ``modules``; ``scales`` (S, 1, 1)."""

    @classmethod
    def scale_of(cls, module: Any) -> float | None:
        """Return the number that a module's tensors are scaled by, or None for a kind without scales."""
        return None

    @classmethod
    def batch_key(cls, module: Any) -> Hashable | None:
        """Return what modules must have in common to be batched, or None if this one cannot be batched now."""
        return cls.__name__

    @classmethod
    def padded_dim(cls, module: Any) -> int:
        """Return the dimension padded when adapters are batched: LoRA's rank, a bottleneck's width."""
        return 1

    @classmethod
    def source_tensors(cls, module: Any) -> list[Tensor]:
        """Return all tensors, any shape, that the batched form is made from; it is made again when one changes."""
        own = [*module.parameters(), *module.buffers()]
        block = module.block
        return [block] if block is not None and lies_in(block, own) else own

    def pre_forward(self, x: Tensor) -> Tensor:
        """Return the input (S, M, i) that the layer reads in place of ``x`` (S, M, i)."""
        return x

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output (S, M, o) in place of ``y`` (S, M, o) of a layer that has read ``x`` (S, M, i)."""
        return y


def changes_input(kind: type[AdapterModule] | type[BatchedAdapter]) -> bool:
    """Return whether a kind of module has a ``pre_forward`` of its own."""
    return kind.pre_forward not in (AdapterModule.pre_forward, BatchedAdapter.pre_forward)


def changes_output(kind: type[AdapterModule] | type[BatchedAdapter]) -> bool:
    """Return whether a kind of module has a ``post_forward`` of its own."""
    return kind.post_forward not in (AdapterModule.post_forward, BatchedAdapter.post_forward)


# -- tensors side by side --------------------------------------------------------------------------------------------


def stack_padded(modules: Sequence[One], tensor: Callable[[One], Tensor]) -> Tensor:
    """Stack one tensor of each module, smaller ones padded with zeros at their ends.

    Args:
        modules: S modules; one that stands for several entries is read once.
        tensor: Takes the tensor from a module, of any shape but the same number of dimensions.

    Returns:
        (S, ...).
    """
    made = {id(module): module for module in modules}
    tensors = {key: tensor(module) for key, module in made.items()}
    shape = [max(sizes) for sizes in zip(*(one.shape for one in tensors.values()), strict=True)]
    padded = {key: _padded(one, shape) for key, one in tensors.items()}
    return torch.stack([padded[id(module)] for module in modules])


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    missing = [(0, most - size) for size, most in zip(tensor.shape, shape, strict=True)]
    return F.pad(tensor, [number for pair in reversed(missing) for number in pair])


def per_entry(values: Sequence[float], like: Tensor) -> Tensor:
    """Return (S, 1, 1), one number for each entry, in dtype and device of ``like`` (any shape)."""
    return torch.tensor(values, dtype=like.dtype, device="cpu").view(-1, 1, 1).to(like.device, non_blocking=True)


def add_bmm(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """Return y (S, M, o) + low (S, M, r) b (S, r, o)."""
    if y.dtype != b.dtype or torch.is_autocast_enabled(y.device.type):
        return y + torch.bmm(low, b).to(y.dtype)
    return torch.baddbmm(y, low, b) if torch.is_grad_enabled() else y.baddbmm_(low, b)


def thin_bmm(x: Tensor, a: Tensor) -> Tensor:
    """Return x (S, M, i) a (S, r, i)^T, (S, M, r)."""
    if x.shape[1] == 1:  # a matrix times a vector is faster with the matrix first
        return torch.bmm(a, x.mT).mT
    return torch.bmm(x, a.mT)


# -- one class for each kind of module -------------------------------------------------------------------------------


class _BatchedLowRank(BatchedAdapter):
    """Abstract: a batched form made from low-rank modules."""

    @classmethod
    def scale_of(cls, module: LowRankModule) -> float:
        return module.scale

    @classmethod
    def batch_key(cls, module: LowRankModule) -> Hashable | None:
        """Return None while training with dropout: masks are drawn module by module."""
        return None if module.p else cls.__name__

    @classmethod
    def padded_dim(cls, module: LowRankModule) -> int:
        return module.lora_A.weight.shape[0] * (2 if isinstance(module, PiSSAModule) else 1)


class BatchedLoRA(_BatchedLowRank):
    """LoRA of S entries: A (S, r, i), scaled, and B (S, r, o).

    PiSSA's start is subtracted as r ranks more: [B, -B0] [A; A0].
    """

    def __init__(self, modules: Sequence[LowRankModule], scales: Tensor) -> None:
        def a_of(lora: LowRankModule) -> Tensor:
            a = lora.lora_A.weight
            return torch.cat((a, lora.start_A)) if isinstance(lora, PiSSAModule) else a

        def b_of(lora: LowRankModule) -> Tensor:
            b = lora.lora_B.weight
            return torch.cat((b, -lora.start_B), dim=1) if isinstance(lora, PiSSAModule) else b

        a = stack_padded(modules, a_of)
        self.a = a * scales if torch.is_grad_enabled() else a.mul_(scales)
        self.b = stack_padded(modules, b_of).mT

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_bmm(y, thin_bmm(x.to(self.a.dtype), self.a), self.b)  # (S, M, i) -> (S, M, r) -> (S, M, o)


class BatchedDoRA(_BatchedLowRank):
    """DoRA of S entries: A (S, r, i), scaled, B (S, r, o), and the ratio of lengths (S, 1, o)."""

    def __init__(self, modules: Sequence[DoRAModule], scales: Tensor) -> None:
        a = stack_padded(modules, lambda dora: dora.lora_A.weight)
        self.a = a * scales
        self.b = stack_padded(modules, lambda dora: dora.lora_B.weight).mT
        self.ratio = stack_padded(modules, DoRAModule.magnitude_ratio)[:, None]
        self.base = modules[0].base

    @classmethod
    def source_tensors(cls, module: DoRAModule) -> list[Tensor]:
        weight = module.base.weight  # the norms depend on the base's weight too
        assert isinstance(weight, Tensor)
        return [*super().source_tensors(module), weight]

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        plain = (y if bias is None else y - bias).to(self.a.dtype)
        out = self.ratio * add_bmm(plain, thin_bmm(x.to(self.a.dtype), self.a), self.b)
        return (out if bias is None else out + bias).to(y.dtype)


class BatchedIA3(BatchedAdapter):
    """IA3 of S entries: the vectors (S, 1, width)."""

    def __init__(self, modules: Sequence[IA3Module], scales: Tensor) -> None:
        self.scales_input = modules[0].scales_input
        self.vectors = stack_padded(modules, lambda ia3: ia3.ia3_l.flatten())[:, None]

    @classmethod
    def batch_key(cls, module: IA3Module) -> Hashable | None:
        return cls.__name__, module.scales_input

    def pre_forward(self, x: Tensor) -> Tensor:
        return (x * self.vectors).to(x.dtype) if self.scales_input else x

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.scales_input:
            return y
        if torch.is_grad_enabled() or y.dtype != self.vectors.dtype:
            return (y * self.vectors).to(y.dtype)
        return y.mul_(self.vectors)


class BatchedBitFit(BatchedAdapter):
    """BitFit of S entries: the offsets (S, 1, o)."""

    def __init__(self, modules: Sequence[BitFitModule], scales: Tensor) -> None:
        self.offsets = stack_padded(modules, lambda bitfit: bitfit.bitfit_b)[:, None]

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        offsets = self.offsets.to(y.dtype)
        return y + offsets if torch.is_grad_enabled() else y.add_(offsets)


class BatchedNetworks:
    """The networks of S bottlenecks: norm (S, 1, i), down (S, m, i), up (S, m, o) with each network's scale in it.

    Where a bottleneck was padded, its activation is f(0), which is zero, and so are the columns behind it.
    """

    def __init__(self, networks: Sequence[BottleneckNetwork], scales: Tensor) -> None:
        self.activation = networks[0].activation
        norms = [network.norm for network in networks if network.norm is not None]  # all have one, or none has
        self.eps = norms[0].eps if norms else None
        if norms:
            self.gain = stack_padded(norms, lambda norm: norm.weight)[:, None]
            self.shift = stack_padded(norms, lambda norm: norm.bias)[:, None]
        self.down = stack_padded(networks, lambda network: network.down.weight)
        self.down_bias = stack_padded(networks, lambda network: network.down.bias)[:, None]
        self.up = (stack_padded(networks, lambda network: network.up.weight) * scales).mT
        self.up_bias = stack_padded(networks, lambda network: network.up.bias)[:, None] * scales

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (S, M, o) plus the outputs of the networks for x (S, M, i), (S, M, o)."""
        h = x.to(self.down.dtype)
        if self.eps is not None:
            h = torch.addcmul(self.shift, F.layer_norm(h, h.shape[-1:], eps=self.eps), self.gain)
        h = self.activation(thin_bmm(h, self.down) + self.down_bias)  # (S, M, m)
        bias = self.up_bias.to(y.dtype)
        return add_bmm(y + bias if torch.is_grad_enabled() else y.add_(bias), h, self.up)


class _BatchedBottleneck(BatchedAdapter):
    """Abstract: a batched form made from bottleneck networks."""

    @staticmethod
    def network(module: Any) -> BottleneckNetwork:
        """Return the network that decides what can be batched."""
        network: BottleneckNetwork = module.bottleneck
        return network

    @classmethod
    def scale_of(cls, module: Any) -> float:
        return float(cls.network(module).scaling)

    @classmethod
    def batch_key(cls, module: Any) -> Hashable | None:
        network = cls.network(module)
        return cls.__name__, network.activation, None if network.norm is None else network.norm.eps

    @classmethod
    def padded_dim(cls, module: Any) -> int:
        return cls.network(module).down.weight.shape[0]


class BatchedSequential(_BatchedBottleneck):
    """Bottlenecks behind a block, of S entries."""

    def __init__(self, modules: Sequence[SequentialAdapter], scales: Tensor) -> None:
        self.networks = BatchedNetworks([module.bottleneck for module in modules], scales)

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        # The networks read y before it is added to in place.
        return self.networks.add_to(y, y)


class BatchedInputTap(_BatchedBottleneck):
    """Input taps of S entries: the first stores the input of all; the block ends with the same entries in order."""

    def __init__(self, modules: Sequence[InputTap], scales: Tensor) -> None:
        self.first = modules[0]

    @staticmethod
    def network(module: InputTap) -> BottleneckNetwork:
        """Return the network that reads what the tap stores: taps are batched as their readers are."""
        return module.network[0]

    def pre_forward(self, x: Tensor) -> Tensor:
        return self.first.pre_forward(x)


class BatchedParallel(_BatchedBottleneck):
    """Bottlenecks beside a block, of S entries."""

    def __init__(self, modules: Sequence[ParallelAdapter], scales: Tensor) -> None:
        self.first = modules[0]
        self.networks = BatchedNetworks([module.bottleneck for module in modules], scales)

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.networks.add_to(y, self.first.pop_input())
