"""PiSSA on one linear layer: LoRA that starts as the r largest singular directions of the weight.

Meng et al. 2024, arXiv:2404.02948, equations 2-4:

    h = W x + s (B A - B0 A0) x        s B0 A0 = the best rank-r approximation of W, A = A0 and B = B0 at the start

The paper moves the rest, W - s B0 A0, into the base; here W stays as it is and the start is subtracted, which is the
same function. Parameters: r (in + out), as LoRA; A0 and B0 are stored and do not train.
Trade-off: it learns faster at the same rank, for two products more in each pass and a singular value decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwerk.errors import ConfigError
from graftwerk.methods.base import TargetModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.low_rank import LowRankModule, low_rank_product, merged_product


class PiSSAModule(LowRankModule):
    """PiSSA on one linear layer: h = W x + s (B A - B0 A0) x.

    Args:
        a: A0, (r, in).
        b: B0, (out, r).
        scale: s.
        p: Probability of dropping an entry of the input while training.
    """

    start_A: Tensor  # noqa: N815 - as in the stored tensors
    start_B: Tensor  # noqa: N815

    def __init__(self, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> None:
        super().__init__(nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale, p)
        self.register_buffer("start_A", a)
        self.register_buffer("start_B", b)

    @classmethod
    def from_base(cls, target: TargetModule, module: nn.Module, rank: int, scale: float, p: float) -> PiSSAModule:
        """Build it from the weight of a linear layer.

        Raises:
            ConfigError: The layer has fewer than ``rank`` singular directions.
        """
        if rank > (most := min(target.in_features, target.out_features)):
            raise ConfigError(f"PiSSA takes {rank} singular directions, but {target.path} has {most}", where="method.r")
        return cls(*pissa_init(base_weight(module), rank, scale), scale, p)

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight  # (r, in), (out, r)
        h = self.dropped(x, a.dtype)  # (..., in)
        trained = low_rank_product(h, a, b, self.scale)  # s B A h, (..., out)
        update = trained - low_rank_product(h, self.start_A, self.start_B, self.scale)  # (..., out)
        return y + update.to(y.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        trained = (self.lora_A.weight, self.lora_B.weight, self.scale)
        return merged_product(weight, trained, (self.start_A, self.start_B, -self.scale)), bias


def pissa_init(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return PiSSA's start: A (r, in) and B (out, r) with scale B A the best rank-r approximation of W.

    Args:
        weight: W, (out, in).
        rank: r, at most min(out, in).
        scale: s.

    Example:
        >>> a, b = pissa_init(torch.eye(3), 3, scale=2.0)
        >>> bool((2 * b @ a - torch.eye(3)).abs().max() < 1e-5)
        True
    """
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = torch.sqrt(s[:rank] / scale)  # (r,)
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
