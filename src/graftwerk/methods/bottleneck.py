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

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.layer_selection import LayerSelection

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}

REDUCTION = 16.0
"""Model width over bottleneck width, if no size is given."""


class Bottleneck(LayerSelection):
    """Settings of bottleneck adapters: placement, and width (``adapter_size``, or model width / ``reduction_factor``).

    Example:
        >>> Bottleneck(reduction_factor=16).size(768)
        48
    """

    name = "bottleneck"
    title = "Bottleneck adapter"
    paper = "Houlsby et al. 2019, arXiv:1902.00751"
    kind = "layer"
    identity_at_start = True
    default_learning_rate = 1e-3

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
        """Return the width m of the bottleneck for a layer of this width."""
        if self.adapter_size is not None:
            return self.adapter_size
        return max(1, round(width / (self.reduction_factor or REDUCTION)))

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        """Select the last linear layers of the blocks, for `parallel` the first ones of the feed-forward too.

        Raises:
            UnsupportedError: the roles of the model's layers are not known.
        """
        roles = {
            "houlsby": (Role.ATTENTION_OUT, Role.FFN_OUT),
            "pfeiffer": (Role.FFN_OUT,),
            "parallel": (Role.FFN_IN, Role.FFN_OUT),
        }[self.placement]
        chosen = [
            target for target in available if target.role in roles and target.unfit is None and not target.weight_only
        ]
        if not chosen:
            raise UnsupportedError(
                "which layers of this model end its attention and feed-forward blocks is not known",
                where="method.placement",
                hint="bottleneck adapters need a listed architecture (`graftwerk methods` names them); LoRA "
                "works on any",
            )
        return self.filter_layers(chosen, available)

    def build_all(self, targets: Sequence[TargetModule], modules: Sequence[nn.Module]) -> dict[str, AdapterModule]:
        """Build the adapter modules for all targets, by path; for `parallel` those of a block share one network.

        Raises:
            UnsupportedError: one layer of a feed-forward block is missing among the targets of `parallel`.
        """
        if self.placement != "parallel":
            return super().build_all(targets, modules)
        halves = [{target.ffn for target in targets if target.role is role} for role in (Role.FFN_IN, Role.FFN_OUT)]
        if torn := halves[0] ^ halves[1]:
            raise UnsupportedError(
                f"one layer of the feed-forward block `{min(map(str, torn))}` is saved whole, and a parallel adapter "
                f"needs both its ends",
                where="method.modules_to_save",
                hint="save the whole block, or none of its layers",
            )
        built: dict[str, AdapterModule] = {}
        taps: dict[str | None, tuple[InputTap, TargetModule]] = {}
        for target in targets:
            if target.role is Role.FFN_IN:
                taps[target.ffn] = (InputTap(), target)
                built[target.path] = taps[target.ffn][0]
        for target in targets:
            if target.role is Role.FFN_OUT:
                tap, first = taps[target.ffn]
                network = self._network(first.in_features, target.out_features)
                tap.network = (network,)
                built[target.path] = ParallelAdapter(network, tap)
        return built

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        return SequentialAdapter(self._network(target.out_features, target.out_features))

    def _network(self, in_width: int, out_width: int) -> BottleneckNetwork:
        return BottleneckNetwork(
            in_width, out_width, self.size(out_width), self.non_linearity, self.layer_norm, self.scaling
        )

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of 2 d m + m + d, and of 2 d more for the norm, over the adapted blocks."""
        total = 0
        for target in targets:
            if target.role is Role.FFN_IN:
                continue
            d, m = target.out_features, self.size(target.out_features)
            total += 2 * d * m + m + d + (2 * d if self.layer_norm else 0)
        return total


class BottleneckNetwork(nn.Module):
    """The two-layer network of an adapter: s up(f(down(norm(x)))); ``up`` starts at zero.

    Args:
        in_width: Width of its input.
        out_width: Width d of its output.
        size: Width m of the bottleneck; ``down`` is (m, in_width), ``up`` (d, m).
        non_linearity: A key of `ACTIVATIONS`.
        layer_norm: True for a trained layer norm before ``down``.
        scaling: s.
    """

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
        """Return s up(f(down(norm(x)))), (..., out_width), for x (..., in_width), in the parameters' dtype."""
        h = x.to(self.down.weight.dtype)
        if self.norm is not None:
            h = self.norm(h)
        out: Tensor = self.up(self.activation(self.down(h)))
        return out if self.scaling == 1.0 else out * self.scaling


class SequentialAdapter(AdapterModule):
    """A bottleneck behind a block: y + up(f(down(norm(y))))."""

    def __init__(self, network: BottleneckNetwork) -> None:
        super().__init__()
        self.bottleneck = network

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + network(y), (..., d), for the block's output y (..., d)."""
        update: Tensor = self.bottleneck(y)
        return y + update.to(y.dtype)


class InputTap(AdapterModule):
    """Store the input (..., d) of a feed-forward block until the adapter at its end takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        # Its reader, in a tuple: it is a child of the other layer, not of this one. Taps are batched as readers are.
        self.network: tuple[BottleneckNetwork, ...] = ()

    def pre_forward(self, x: Tensor) -> Tensor:
        """Store x (..., d) and return it unchanged."""
        self.seen = x
        return x


class ParallelAdapter(AdapterModule):
    """A bottleneck beside a feed-forward block: FFN(x) + s up(f(down(norm(x)))), x from an `InputTap`."""

    def __init__(self, network: BottleneckNetwork, tap: InputTap) -> None:
        super().__init__()
        self.bottleneck = network
        self._tap = (tap,)  # in a tuple: it is a child of the other layer, not of this one

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + network(block input), (..., d), for the block's output y (..., d)."""
        update: Tensor = self.bottleneck(self.pop_input())
        return y + update.to(y.dtype)

    def pop_input(self) -> Tensor:
        """Return the input (..., d) of the block and drop the tap's reference to it."""
        seen, self._tap[0].seen = self._tap[0].seen, None
        assert seen is not None, "the feed-forward block ended without having begun"
        return seen
