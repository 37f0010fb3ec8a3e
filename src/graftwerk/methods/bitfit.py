"""BitFit: the biases alone are trained.

Paper: Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199, equation 1-2. Here as a trained offset on every bias of the base model (linear
layers and norms), starting at zero, so that the base's own biases stay as they are. Biases that are added elsewhere
(of convolutions, of norms over channels that come first, DeBERTa's `q_bias`) are left out; `print(adapter)` says so:

    y + b'        for every layer that has a bias b; merged: b + b'

Parameters: out for each layer with a bias.
Trade-off: almost nothing to store, almost as good as LoRA on small data with encoders; impossible on models without
biases (Llama, Mistral, Gemma, T5), where it raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.layer_selection import LayerSelection


class BitFit(LayerSelection):
    """Settings of BitFit: the choice of layers alone.

    Example:
        >>> BitFit(layers="top-2").default_learning_rate
        0.003
    """

    name = "bitfit"
    title = "BitFit"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    default_learning_rate = 3e-3

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        """Select every linear layer and norm with a bias.

        Raises:
            UnsupportedError: the model has no biases.
        """
        chosen = [target for target in available if self.reaches(target)]
        if not chosen:
            others = [target.path for target in available if self.leaves_out(target)]
            shown = f", but {len(others)} elsewhere, which it does not reach: {', '.join(others[:3])}" if others else ""
            raise UnsupportedError(
                f"BitFit trains the biases of linear layers and norms, and this model has none there{shown}",
                where="method",
                hint="use lora or ia3, which need none",
            )
        return self.filter_layers(chosen, available)

    @classmethod
    def reaches(cls, target: TargetModule) -> bool:
        """Return True for a bias inside the base that it trains."""
        return target.has_bias and target.role is not Role.HEAD and not cls.leaves_out(target)

    @staticmethod
    def leaves_out(target: TargetModule) -> bool:
        """Return True for a bias that cannot be reached as an offset on a layer's output."""
        return target.has_bias and (target.role is Role.LOOSE_BIAS or target.weight_only or target.unfit is not None)

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        return BitFitModule(target.out_features)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of out over layers with a bias."""
        return sum(target.out_features for target in targets)


class BitFitModule(AdapterModule):
    """A trained offset on the output of one layer: y + b'.

    Args:
        width: out, the number of entries of ``bitfit_b`` (out,).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bitfit_b = nn.Parameter(torch.zeros(width))

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + b', (..., out), in the dtype of ``y``; ``x`` (..., in) is not read."""
        return y + self.bitfit_b.to(y.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        return weight, (bias + self.bitfit_b).to(bias.dtype)
