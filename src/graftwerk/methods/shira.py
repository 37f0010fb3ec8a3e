"""SHiRA: a few entries of the weight, drawn once, are trained; all others stay as they are.

Paper: Bhardwaj et al. 2024, "Sparse High Rank Adapters", arXiv:2406.13175, with its random mask (SHiRA-Rand):

    h = (W + S) x        S (out, in) is zero but at r (in + out) random places, whose values v start at zero

Parameters: r (in + out) for each adapted layer, as LoRA; the places are stored with them and do not train.
Trade-off: an update of high rank, of which merging rewrites few entries, so that several adapters disturb each other
little; every step goes over the whole of S as over a dense matrix, which LoRA's thin products avoid.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import ConfigError
from graftwerk.methods.base import AdapterModule, TargetModule
from graftwerk.methods.linear_layers import LinearLayerMethod, Rank


class SHiRAModule(AdapterModule):
    """SHiRA on one linear layer: h = (W + S) x.

    Args:
        values: v, (k,).
        indices: Row and column of each value, (2, k), int32.
        out_features: out.
        in_features: in.

    Example:
        >>> shira = SHiRAModule(nn.Parameter(torch.tensor([5.0])), torch.tensor([[1], [0]]), 2, 3)
        >>> shira.post_forward(torch.ones(3), torch.zeros(2)).tolist()
        [0.0, 5.0]
    """

    shira_indices: Tensor

    def __init__(self, values: nn.Parameter, indices: Tensor, out_features: int, in_features: int) -> None:
        super().__init__()
        self.shira_weight = values
        self.register_buffer("shira_indices", indices.int())
        self.shape = out_features, in_features

    def sparse(self) -> Tensor:
        """Return S as a dense matrix, (out, in)."""
        rows, columns = self.shira_indices.long()
        return self.shira_weight.new_zeros(self.shape).index_put((rows, columns), self.shira_weight, accumulate=True)

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x.to(self.shira_weight.dtype), self.sparse()).to(y.dtype)  # (..., in) -> (..., out)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (weight + self.sparse()).to(weight.dtype), bias


def random_indices(out_features: int, in_features: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``count`` different places of an (out, in) matrix, row by row: (2, count), int32.

    A generator with a seed gives the places that PEFT draws with it. None takes torch's own generator.
    """
    drawn = torch.randperm(out_features * in_features, generator=generator, device="cpu")
    flat = drawn[:count].sort().values  # (count,)
    return torch.stack((flat // in_features, flat % in_features)).int()


class SHiRA(LinearLayerMethod):
    """Settings of SHiRA.

    Example:
        >>> SHiRA(r=8).num_parameters([TargetModule("q_proj", "query", 512, 512, False)])
        8192
    """

    name = "shira"
    title = "SHiRA"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "SHIRA"
    default_learning_rate = 1e-3

    r: Rank = Field(
        8,
        validation_alias=AliasChoices("r", "rank"),
        description="r (in + out) entries of a layer train, as many as LoRA has at that rank",
    )
    random_seed: int | None = Field(
        None, ge=0, lt=2**63, description="draws the entries, the same in each layer; null: from the run's seed"
    )

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        count = self.num_parameters([target])
        if count > target.in_features * target.out_features:
            raise ConfigError(
                f"r = {self.r} would train {count:,} entries, but {target.path} has "
                f"{target.in_features * target.out_features:,}",
                where="method.r",
                hint="choose a smaller r",
            )
        generator = None if self.random_seed is None else torch.Generator("cpu").manual_seed(self.random_seed)
        indices = random_indices(target.out_features, target.in_features, count, generator)
        return SHiRAModule(nn.Parameter(torch.zeros(count)), indices, target.out_features, target.in_features)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of r (in + out)."""
        return sum(self.r * (t.in_features + t.out_features) for t in targets)
