"""OFT: the input of a layer is rotated in small blocks; angles between the weight's rows stay as they are.

Paper: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280, in the form
of Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847, which rotates the input and not the weight:

    h = W R^T x        R = diag(R_1, ..., R_n), each R_i (b, b) orthogonal, made of a skew-symmetric Q_i (zero at start)
    R_i = (I + Q)(I - Q)^-1 ~ (I + Q)(I + Q + Q^2 + ... + Q^(k-2))        k terms of Neumann's series

Without ``use_cayley_neumann`` the inverse is exact, and as PEFT has it: R_i = (I - Q)(I + Q)^-1.

Parameters: in (b - 1) / 2 for each adapted layer: b (b - 1) / 2 in each of in / b blocks; (b - 1) b / 2 if they share.
Trade-off: keeps what the weight's rows say to each other, so it forgets little and bears high learning rates; nothing
is left at inference once merged. Lengths cannot be learnt, and blocks that are not adjacent never meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graftwerk.errors import ConfigError
from graftwerk.methods.base import AdapterModule, TargetModule
from graftwerk.methods.linear_layers import LinearLayerMethod
from graftwerk.methods.low_rank import Factor


class OFTModule(AdapterModule):
    """OFT on one linear layer: h = W R^T x.

    Args:
        angles: The entries above the diagonals of Q, row by row, (n, b (b - 1) / 2); n = 1 if all blocks share them.
        block_size: b.
        terms: k of Neumann's series, at least 4; None for the exact inverse.

    Example:
        >>> oft = OFTModule(nn.Parameter(torch.ones(1, 1)), block_size=2, terms=None)
        >>> oft.pre_forward(torch.tensor([1.0, 2.0])).tolist()
        [2.0, -1.0]
    """

    def __init__(self, angles: nn.Parameter, block_size: int, terms: int | None) -> None:
        super().__init__()
        self.oft_R = Factor(angles)
        self.block_size, self.terms = block_size, terms

    def rotation(self) -> Tensor:
        """Return the blocks R_i, (n, b, b)."""
        angles, b = self.oft_R.weight, self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=angles.device)
        upper = angles.new_zeros(len(angles), b, b)
        upper[:, rows, columns] = angles
        q, identity = upper - upper.mT, torch.eye(b, dtype=angles.dtype, device=angles.device)
        if self.terms is None:
            exact: Tensor = torch.linalg.solve(identity + q, identity - q, left=False)
            return exact
        series = identity
        for _ in range(self.terms - 2):
            series = identity + series @ q
        return (identity + q) @ series

    def pre_forward(self, x: Tensor) -> Tensor:
        return rotate(x, self.rotation()).to(x.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return rotate(weight, self.rotation().mT).to(weight.dtype), bias


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x (..., in) with each block of b entries, as a row, times its (b, b) matrix of ``rotation`` (n, b, b).

    One matrix serves all blocks if n is 1. The product is taken in the finer of both precisions.
    """
    fine = torch.promote_types(x.dtype, rotation.dtype)
    blocks = x.to(fine).reshape(*x.shape[:-1], -1, rotation.shape[-1])  # (..., in) -> (..., n, b)
    matrices = rotation.to(fine).expand(blocks.shape[-2], -1, -1)
    return torch.einsum("...nk,nkc->...nc", blocks, matrices).reshape(x.shape)


class OFT(LinearLayerMethod):
    """Settings of OFT.

    Example:
        >>> OFT(oft_block_size=32).num_parameters([TargetModule("q_proj", "query", 512, 512, False)])
        7936
    """

    name = "oft"
    title = "OFT"
    paper = "Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "OFT"
    default_learning_rate = 1e-3

    oft_block_size: int = Field(
        32, ge=0, le=65536, description="width of a block; a layer takes the nearest width that divides its input"
    )
    r: int = Field(0, ge=0, le=65536, description="number of blocks of a layer, in place of their width; 0: not given")
    block_share: bool = Field(False, description="one rotation for all blocks of a layer")
    use_cayley_neumann: bool = Field(True, description="a series in place of the inverse: faster, nearly orthogonal")
    num_cayley_neumann_terms: int = Field(5, ge=4, le=64, description="terms of that series")

    @model_validator(mode="before")
    @classmethod
    def _width_or_number(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("r") and "oft_block_size" not in values:
            return {**values, "oft_block_size": 0}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> OFT:
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError("give oft_block_size or r, the width of blocks or their number, not both")
        if self.oft_block_size == 1:
            raise ValueError("a block of one entry has nothing to rotate")
        return self

    def block_size(self, in_features: int) -> int:
        """Return b at a layer with this input: the divisor of its width that is nearest to what is set, as in PEFT."""
        if self.oft_block_size:
            return nearest_divisor(in_features, self.oft_block_size)
        return in_features // nearest_divisor(in_features, self.r)

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        b = self.block_size(target.in_features)
        if b == 1:
            raise ConfigError(
                f"{target.path} has {target.in_features} inputs, which no width near what is set divides",
                where="method.oft_block_size",
                hint="choose a width nearer to a divisor, or leave the layer out",
            )
        n = 1 if self.block_share else target.in_features // b
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        return OFTModule(nn.Parameter(torch.zeros(n, b * (b - 1) // 2)), b, terms)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of in (b - 1) / 2; of b (b - 1) / 2 if blocks share their rotation."""
        total = 0
        for target in targets:
            b = self.block_size(target.in_features)
            total += (b if self.block_share else target.in_features) * (b - 1) // 2
        return total


def nearest_divisor(number: int, wished: int) -> int:
    """Return the divisor of ``number`` nearest to ``wished``; of two, the lower.

    Example:
        >>> nearest_divisor(384, 32), nearest_divisor(24, 7), nearest_divisor(24, 10), nearest_divisor(24, 100)
        (32, 6, 8, 24)
    """
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wished), d))
