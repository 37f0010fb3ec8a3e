"""DoRA: LoRA on the direction of each output's weight row, its length trained apart.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5, with section 4.3
(the norm is a constant in the backward pass):

    h = m / ||W + s B A||  *  (W x + s B A x) + bias        m (out,) starts as the row norms of W; norms are over inputs

Parameters: LoRA's r (in + out), plus out.
Trade-off: nearer to full fine-tuning than LoRA at small ranks, for a product W A^T more in every step. Dropout acts
on the low-rank path alone (PEFT drops the input of W x too while training; without dropout both are the same
function).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.low_rank import LowRankModule, low_rank_product
from graftwerk.methods.placement import module_device


class DoRAModule(LowRankModule):
    """DoRA on one linear layer: h = m / ||W + s B A|| * (W x + s B A x) + bias.

    Args:
        base: The adapted layer, whose weight the norm is of. It is read, never registered as a child.
        a: A, (r, in).
        b: B, (out, r).
        magnitude: m, (out,).
        scale: s.
        p: Probability of dropping an entry of the input while training.
    """

    def __init__(
        self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, magnitude: nn.Parameter, scale: float, p: float = 0.0
    ) -> None:
        super().__init__(a, b, scale, p)
        self._base = (base,)  # in a tuple, so that it is no child
        self.lora_magnitude_vector = magnitude

    @classmethod
    def from_base(cls, base: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float, p: float) -> DoRAModule:
        """Build a module whose m starts at the row norms of W + s B A, on the device of the base's weights.

        Args:
            base: The adapted layer.
            a: A, (r, in).
            b: B, (out, r).
            scale: s.
            p: Probability of dropping an entry of the input while training.
        """
        device, weight = module_device(base), base_weight(base)
        a, b = (nn.Parameter(factor.detach().to(device)) for factor in (a, b))
        module = cls(base, a, b, nn.Parameter(torch.empty(weight.shape[0], device=device)), scale, p)
        module.lora_magnitude_vector = nn.Parameter(module.weight_norm(weight).clone())
        return module

    @property
    def base(self) -> nn.Module:
        """The adapted layer."""
        return self._base[0]

    @torch.no_grad()
    def weight_norm(self, weight: Tensor) -> Tensor:
        """Return the row norms of W + s B A, (out,), without forming B A.

        ||w + s b A||^2 = ||w||^2 + 2 s b·(A w) + s^2 b (A A^T) b^T for each row w of W and b of B.

        Args:
            weight: W, (out, in).
        """
        a, b = self.lora_A.weight, self.lora_B.weight
        weight = weight.to(a.dtype)
        squares = weight.square().sum(1)  # (out,)
        cross = (F.linear(weight, a) * b).sum(1)  # (out, r) -> (out,)
        own = (F.linear(b, a @ a.T) * b).sum(1)  # (out, r) -> (out,)
        return (squares + 2 * self.scale * cross + self.scale**2 * own).clamp_min(0).sqrt()

    def magnitude_ratio(self) -> Tensor:
        """Return m / ||W + s B A||, (out,)."""
        return self.lora_magnitude_vector / self.weight_norm(base_weight(self.base))

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        a, b = self.lora_A.weight, self.lora_B.weight  # (r, in), (out, r)
        update = low_rank_product(self.dropped(x, a.dtype), a, b, self.scale)  # s B A dropout(x), (..., out)
        direction = (y if bias is None else y - bias) + update  # (W + s B A) x, (..., out)
        out = self.magnitude_ratio() * direction
        return (out if bias is None else out + bias).to(y.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ratio = self.lora_magnitude_vector / self.weight_norm(weight)
        whole = weight.to(ratio.dtype) + self.scale * (self.lora_B.weight @ self.lora_A.weight)  # (out, in)
        return (ratio[:, None] * whole).to(weight.dtype), bias
