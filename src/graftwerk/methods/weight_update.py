"""Updates that are a function of the weight of the layer itself.

h = W x + U(W) dropout(x)        U (out, in)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.dropout import InputDropout


class WeightUpdate(InputDropout, ABC):
    """Abstract: h = W x + U(W) dropout(x), the update U (out, in) being a function of the weight W.

    Args:
        base: The adapted layer, whose weight is read in every pass. It is never registered as a child.
        p: Probability of dropping an entry of the input of U while training.
    """

    def __init__(self, base: nn.Module, p: float = 0.0) -> None:
        super().__init__(p)
        self._base = (base,)  # in a tuple, so that it is no child

    @abstractmethod
    def weight_update(self, weight: Tensor) -> Tensor:
        """Return U (out, in) for the weight W (out, in), in the dtype of the parameters."""

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        update = self.weight_update(base_weight(self._base[0]))  # (out, in)
        return y + F.linear(self.dropped(x, update.dtype), update).to(y.dtype)  # (..., in) -> (..., out)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = self.weight_update(weight)  # (out, in)
        return (weight.to(torch.promote_types(weight.dtype, update.dtype)) + update).to(weight.dtype), bias
