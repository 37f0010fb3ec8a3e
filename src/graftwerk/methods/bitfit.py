"""BitFit: the biases alone are trained.

Paper: Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199, equation 1-2. Here as a trained offset on every bias of the base model (linear
layers and norms), starting at zero, so that the base's own biases stay as they are. Biases that are added elsewhere
(of convolutions, of norms over channels that come first, DeBERTa's `q_bias`) are left out, and `print(graft)` says so:

    y + b'        for every layer that has a bias b; merged: b + b'

Parameters: out for each layer with a bias.
Trade-off: almost nothing to store, almost as good as LoRA on small data with encoders; impossible on models without
biases (Llama, Mistral, Gemma, T5), where it raises.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Delta, Place, Role
from graftwerk.methods.depth import Layered
from graftwerk.methods.stacked import StackedDelta, stack


class BitFit(Layered):
    """Settings: none of its own but which layers."""

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "Ben Zaken et al. 2021, arXiv:2106.10199"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "layer"
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    default_learning_rate: ClassVar[float] = 3e-3

    def places(self, available: Sequence[Place]) -> list[Place]:
        chosen = [place for place in available if self.reaches(place)]
        if not chosen:
            others = [place.path for place in available if self.leaves_out(place)]
            shown = f", but {len(others)} elsewhere, which it does not reach: {', '.join(others[:3])}" if others else ""
            raise UnsupportedError(
                f"BitFit trains the biases of linear layers and norms, and this model has none there{shown}",
                where="method",
                mend="use lora or ia3, which need none",
            )
        return self.within(chosen, available)

    @classmethod
    def reaches(cls, place: Place) -> bool:
        """Return whether this is a bias inside the base that it trains."""
        return place.has_bias and place.role is not Role.HEAD and not cls.leaves_out(place)

    @staticmethod
    def leaves_out(place: Place) -> bool:
        """Return whether this is a bias that cannot be reached as an offset on a layer's output."""
        return place.has_bias and (place.role is Role.LOOSE_BIAS or place.weight_only or place.unfit is not None)

    def build(self, place: Place, module: nn.Module) -> Delta:
        return BitFitDelta(place.out_features)

    def count(self, places: Iterable[Place]) -> int:
        """sum of out over layers with a bias."""
        return sum(place.out_features for place in places)


class BitFitDelta(Delta):
    """``bitfit_b`` (out,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bitfit_b = nn.Parameter(torch.zeros(width))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bitfit_b.to(y.dtype)

    def kin(self) -> Hashable | None:
        return "bitfit"

    @staticmethod
    def stacked(deltas: Sequence[BitFitDelta]) -> StackedDelta:
        return StackedBitFit(deltas)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        return weight, (bias + self.bitfit_b).to(bias.dtype)


class StackedBitFit(StackedDelta):
    """The offsets (S, 1, out)."""

    def __init__(self, deltas: Sequence[BitFitDelta]) -> None:
        self.offsets = stack(deltas, lambda delta: delta.bitfit_b)[:, None]

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        offsets = self.offsets.to(y.dtype)
        return y + offsets if torch.is_grad_enabled() else y.add_(offsets)
