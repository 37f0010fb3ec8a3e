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

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.methods.base import Delta, Place, base_weight, device_of, stored_weight
from graftwerk.methods.dropout import dropout
from graftwerk.methods.fused import Term, fused_linear, fusible
from graftwerk.methods.sharing import Siblings, shared_by
from graftwerk.methods.stacked import StackedDelta, add_product, each, product, stack


class DoRADelta(Delta):
    """``lora_A`` (r, in), ``lora_B`` (out, r), ``lora_magnitude_vector`` (out,)."""

    def __init__(
        self, place: Place, module: nn.Module, rank: int, scale: float, dropout: float, identity: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.siblings: Siblings | None = None
        self.lora_A = nn.Linear(place.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, place.out_features, bias=False)
        if identity:
            nn.init.zeros_(self.lora_B.weight)
        # The base layer in a tuple: read, never registered as a child of the adapter.
        self._base = (module,)
        self._squares: Tensor | None = None
        self._seen: object = None
        self.to(device_of(module))  # the norm is taken where the base's weights are
        self.lora_magnitude_vector = nn.Parameter(self.norm(base_weight(module)).clone())

    @classmethod
    def holding(cls, module: nn.Module, parameters: Sequence[nn.Parameter], scale: float, dropout: float) -> DoRADelta:
        """A delta of these parameters, in the mode of its base module; nothing is drawn or copied, no norm taken."""
        from graftwerk.methods.lora import linear_of

        a, b, magnitude = parameters
        delta = cls.__new__(cls)
        nn.Module.__init__(delta)
        delta.__dict__.update(
            scale=scale,
            dropout=dropout,
            siblings=None,
            _base=(module,),
            _squares=None,
            _seen=None,
            training=module.training,
        )
        delta._modules.update(lora_A=linear_of(a, module.training), lora_B=linear_of(b, module.training))
        delta._parameters.update(lora_magnitude_vector=magnitude)
        return delta

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Row norms of W + s B A, (out,), without ever forming B A.

        ||w + s b A||^2 = ||w||^2 + 2 s b·(A w) + s^2 b (A A^T) b^T, row by row.
        """
        a, b = self.lora_A.weight, self.lora_B.weight
        weight = weight.to(a.dtype)
        base = stored_weight(self._base[0])
        version = None if base.is_inference() else (base.data_ptr(), base._version, weight.dtype, weight.device)
        if self._squares is None or version is None or version != self._seen:
            self._squares, self._seen = weight.square().sum(1), version
        cross = (F.linear(weight, a) * b).sum(1)
        own = (F.linear(b, a @ a.T) * b).sum(1)
        return (self._squares + 2 * self.scale * cross + self.scale**2 * own).clamp_min(0).sqrt()

    def ratio(self) -> Tensor:
        """m / ||W + s B A||, (out,)."""
        return self.lora_magnitude_vector / self.norm(base_weight(self._base[0]))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        module = self._base[0]
        a, b = self.lora_A.weight, self.lora_B.weight
        ratio = self.ratio()
        h = x.to(a.dtype)
        if self.dropout and self.training:
            h = dropout(h, self.dropout, shared_by(x).seed(self.siblings or self, self))
        update = F.linear(F.linear(h, a) * self.scale, b)
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        plain = y if bias is None else y - bias
        out = ratio * (plain + update)
        return (out if bias is None else out + bias).to(y.dtype)

    def through(self, layer: nn.Module, x: Tensor, others: Sequence[Delta]) -> Tensor | None:
        # The direction in one node; backward needs it whole, for the magnitudes, and nothing else of this size.
        if others or not fusible(layer, x, bias=False) or torch.is_autocast_enabled(x.device.type):
            return None
        p = self.dropout if self.training else 0.0
        seed = shared_by(x).seed(self.siblings or self, self) if p else 0
        term = Term(self.lora_A.weight, self.lora_B.weight, self.scale, p, seed)
        turned = fused_linear(layer, x, [term], bias=False)
        ratio, bias = self.ratio(), layer.bias
        out = ratio * turned if bias is None else torch.addcmul(bias, ratio, turned)  # type: ignore[arg-type]
        return out.to(turned.dtype)

    def kin(self) -> Hashable | None:
        return None if self.dropout and self.training else "dora"

    @property
    def breadth(self) -> int:
        return self.lora_A.weight.shape[0]

    @staticmethod
    def stacked(deltas: Sequence[DoRADelta]) -> StackedDelta:
        return StackedDoRA(deltas)

    def sources(self) -> list[Tensor]:
        weight = self._base[0].weight  # norms are of the base's weight too
        assert isinstance(weight, Tensor)
        return [*super().sources(), weight]

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ratio = self.lora_magnitude_vector / self.norm(weight)
        whole = weight.to(ratio.dtype) + self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return (ratio[:, None] * whole).to(weight.dtype), bias


class StackedDoRA(StackedDelta):
    """A (S, r, i), scaled, B (S, r, o), and the ratio of lengths (S, 1, o)."""

    def __init__(self, deltas: Sequence[DoRADelta]) -> None:
        a = stack(deltas, lambda delta: delta.lora_A.weight)
        self.a = a * each([delta.scale for delta in deltas], a)
        self.b = stack(deltas, lambda delta: delta.lora_B.weight).mT
        self.ratio = stack(deltas, DoRADelta.ratio)[:, None]
        self._base = deltas[0]._base[0]

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self._base.bias
        assert bias is None or isinstance(bias, Tensor)
        plain = (y if bias is None else y - bias).to(self.a.dtype)
        out = self.ratio * add_product(plain, product(x.to(self.a.dtype), self.a), self.b)
        return (out if bias is None else out + bias).to(y.dtype)
