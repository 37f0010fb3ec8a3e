"""Bottleneck adapters: a small two-layer network beside or behind a frozen block.

Papers: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, figure 2 (after the
attention output and after the feed-forward output, before each is added to the residual); Pfeiffer et al. 2020,
arXiv:2005.00247 (after the feed-forward only); He et al. 2021, "Towards a Unified View", arXiv:2110.04366, equation 6
(parallel, on the feed-forward's input):

    sequential:  y + up(f(down(norm(y))))          y: output of the block's last linear layer
    parallel:    FFN(x) + s up(f(down(norm(x))))   x: input of the feed-forward block

``up`` starts at zero, so the model starts as the base exactly. (The paper starts near it, with small normal weights;
zero trains as well here and makes the start testable.)

Parameters for each adapter of size m on width d: 2 d m + m + d, and 2 d more for its layer norm.
Trade-off: the steadiest of the small methods on small data; it cannot be merged, so it stays in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Delta, Place, Role
from graftwerk.methods.depth import Layered
from graftwerk.methods.stacked import StackedDelta, add_product, each, product, stack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


class Bottleneck(Layered):
    """Settings: where adapters stand and how wide they are (``adapter_size``, or the width over
    ``reduction_factor``).
    """

    name: ClassVar[str] = "bottleneck"
    title: ClassVar[str] = "Bottleneck adapter"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "layer"
    identity_at_start: ClassVar[bool] = True
    default_learning_rate: ClassVar[float] = 1e-3

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        default="houlsby",
        description="after attention and feed-forward, after feed-forward, or beside the feed-forward",
    )
    reduction_factor: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="adapter size = model width / this; 16 where neither is given"
    )
    adapter_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        validation_alias=AliasChoices("adapter_size", "bottleneck_size"),
        description="width of the bottleneck",
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field(default="gelu", description="between down and up")
    layer_norm: bool = Field(default=True, description="a trained layer norm before the down projection")
    scaling: float = Field(
        default=1.0, gt=0, description="factor on the adapter's output (the paper's s for parallel: 4)"
    )

    @model_validator(mode="after")
    def _one_size(self) -> Bottleneck:
        if self.adapter_size is not None and self.reduction_factor is not None:
            raise ValueError("give adapter_size or reduction_factor, not both")
        return self

    def size(self, width: int) -> int:
        """Width of the bottleneck for a layer of this width."""
        if self.adapter_size is not None:
            return self.adapter_size
        return max(1, round(width / (self.reduction_factor or 16.0)))

    def places(self, available: Sequence[Place]) -> list[Place]:
        roles = {
            "houlsby": (Role.ATTENTION_OUT, Role.FFN_OUT),
            "pfeiffer": (Role.FFN_OUT,),
            "parallel": (Role.FFN_IN, Role.FFN_OUT),
        }[self.placement]
        chosen = [place for place in available if place.role in roles and place.unfit is None and not place.weight_only]
        if not chosen:
            raise UnsupportedError(
                "which layers of this model end its attention and feed-forward blocks is not known",
                where="method.placement",
                mend="bottleneck adapters need a listed architecture (`graftwerk methods` names them); LoRA "
                "works on any",
            )
        return self.within(chosen, available)

    def assemble(self, places: Sequence[Place], modules: Sequence[nn.Module]) -> dict[str, Delta]:
        if self.placement != "parallel":
            return super().assemble(places, modules)
        halves = [{place.ffn for place in places if place.role is role} for role in (Role.FFN_IN, Role.FFN_OUT)]
        if torn := halves[0] ^ halves[1]:
            raise UnsupportedError(
                f"one layer of the feed-forward block `{min(map(str, torn))}` is saved whole, and a parallel adapter "
                f"needs both its ends",
                where="method.modules_to_save",
                mend="save the whole block, or none of its layers",
            )
        deltas: dict[str, Delta] = {}
        taps: dict[str | None, tuple[Tap, Place]] = {}
        for place in places:
            if place.role is Role.FFN_IN:
                taps[place.ffn] = (Tap(), place)
                deltas[place.path] = taps[place.ffn][0]
        for place in places:
            if place.role is Role.FFN_OUT:
                tap, entry = taps[place.ffn]
                network = self._network(entry.in_features, place.out_features)
                tap.network = (network,)
                deltas[place.path] = ParallelDelta(network, tap)
        return deltas

    def build(self, place: Place, module: nn.Module) -> Delta:
        return SequentialDelta(self._network(place.out_features, place.out_features))

    def _network(self, in_width: int, out_width: int) -> BottleneckNetwork:
        return BottleneckNetwork(
            in_width, out_width, self.size(out_width), self.non_linearity, self.layer_norm, self.scaling
        )

    def count(self, places: Iterable[Place]) -> int:
        """sum of 2 d m + m + d, with 2 d for the norm, over the blocks' outputs."""
        total = 0
        for place in places:
            if place.role is Role.FFN_IN:
                continue
            d, m = place.out_features, self.size(place.out_features)
            total += 2 * d * m + m + d + (2 * d if self.layer_norm else 0)
        return total


class BottleneckNetwork(nn.Module):
    """norm, down (m, d), non-linearity, up (d, m) starting at zero, scale."""

    def __init__(
        self, in_width: int, out_width: int, size: int, non_linearity: str, layer_norm: bool, scaling: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_width) if layer_norm else None
        self.down = nn.Linear(in_width, size)
        self.up = nn.Linear(size, out_width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = ACTIVATIONS[non_linearity]
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.down.weight.dtype)
        if self.norm is not None:
            h = self.norm(h)
        out: Tensor = self.up(self.activation(self.down(h)))
        return out if self.scaling == 1.0 else out * self.scaling

    def kin(self) -> Hashable:
        return (self.activation, None if self.norm is None else self.norm.eps)

    @property
    def breadth(self) -> int:
        return self.down.weight.shape[0]


class StackedNetwork:
    """norm (S, 1, i), down (S, m, i), up (S, m, o), each network's scale in its last layer.

    Where a bottleneck was filled up, its activation is f(0), which is zero, and so are the columns behind it.
    """

    def __init__(self, networks: Sequence[BottleneckNetwork]) -> None:
        self.activation = networks[0].activation
        norms = [network.norm for network in networks if network.norm is not None]  # all have one, or none has
        self.eps = norms[0].eps if norms else None
        if norms:
            self.gain = stack(norms, lambda norm: norm.weight)[:, None]
            self.shift = stack(norms, lambda norm: norm.bias)[:, None]
        self.down = stack(networks, lambda network: network.down.weight)
        self.down_bias = stack(networks, lambda network: network.down.bias)[:, None]
        scales = each([network.scaling for network in networks], self.down)
        self.up = (stack(networks, lambda network: network.up.weight) * scales).mT
        self.up_bias = stack(networks, lambda network: network.up.bias)[:, None] * scales

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y (S, M, o) and what the networks make of x (S, M, i)."""
        h = x.to(self.down.dtype)
        if self.eps is not None:
            h = torch.addcmul(self.shift, F.layer_norm(h, h.shape[-1:], eps=self.eps), self.gain)
        h = self.activation(product(h, self.down) + self.down_bias)
        bias = self.up_bias.to(y.dtype)
        return add_product(y + bias if torch.is_grad_enabled() else y.add_(bias), h, self.up)


class SequentialDelta(Delta):
    def __init__(self, network: BottleneckNetwork) -> None:
        super().__init__()
        self.bottleneck = network

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        update: Tensor = self.bottleneck(y)
        return y + update.to(y.dtype)

    def kin(self) -> Hashable | None:
        return ("sequential", self.bottleneck.kin())

    @property
    def breadth(self) -> int:
        return self.bottleneck.breadth

    @staticmethod
    def stacked(deltas: Sequence[SequentialDelta]) -> StackedDelta:
        return StackedSequential(deltas)


class StackedSequential(StackedDelta):
    def __init__(self, deltas: Sequence[SequentialDelta]) -> None:
        self.network = StackedNetwork([delta.bottleneck for delta in deltas])

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        # The bottleneck reads y, which is added to in place: it reads it first.
        return self.network.added(y, y)


class Tap(Delta):
    """Remembers what goes into the feed-forward block, until the block's end takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        # What reads it, in a tuple: it is a child of the other layer, not of this one. Taps are stacked as that is.
        self.network: tuple[BottleneckNetwork, ...] = ()

    def enter(self, x: Tensor) -> Tensor:
        self.seen = x
        return x

    def kin(self) -> Hashable | None:
        return ("tap", self.network[0].kin())

    @property
    def breadth(self) -> int:
        return self.network[0].breadth

    @staticmethod
    def stacked(deltas: Sequence[Tap]) -> StackedDelta:
        return StackedTap(deltas)


class StackedTap(StackedDelta):
    """What all entries read is kept by the first one's tap: the block's end has the same entries in the same order."""

    def __init__(self, deltas: Sequence[Tap]) -> None:
        self.first = deltas[0]

    def enter(self, x: Tensor) -> Tensor:
        return self.first.enter(x)


class ParallelDelta(Delta):
    def __init__(self, network: BottleneckNetwork, tap: Tap) -> None:
        super().__init__()
        self.bottleneck = network
        self._tap = (tap,)  # in a tuple: it is a child of the other layer, not of this one

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        update: Tensor = self.bottleneck(self.taken())
        return y + update.to(y.dtype)

    def taken(self) -> Tensor:
        """What went into the block; it is not kept any longer."""
        seen, self._tap[0].seen = self._tap[0].seen, None
        assert seen is not None, "the feed-forward block ended without having begun"
        return seen

    def kin(self) -> Hashable | None:
        return ("parallel", self.bottleneck.kin())

    @property
    def breadth(self) -> int:
        return self.bottleneck.breadth

    @staticmethod
    def stacked(deltas: Sequence[ParallelDelta]) -> StackedDelta:
        return StackedParallel(deltas)


class StackedParallel(StackedDelta):
    def __init__(self, deltas: Sequence[ParallelDelta]) -> None:
        self.first = deltas[0]
        self.network = StackedNetwork([delta.bottleneck for delta in deltas])

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network.added(self.first.taken(), y)
