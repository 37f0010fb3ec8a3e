"""HiRA: the weight times a trained low-rank matrix, entry by entry, so that the update has a high rank.

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR,
OpenReview TwJrTz9cRS:

    h = W x + (W * B A) x        A (r, in) Kaiming-uniform, B (out, r) zero; * entry by entry; dropout on x there only

Parameters: r (in + out) for each adapted layer, as LoRA.
Trade-off: the update's rank reaches r times that of W for LoRA's parameters, and once merged it costs nothing at
inference; B A has to be formed and the weight passed over once more in every step, and where W is zero nothing is
learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import AliasChoices, Field
from torch import Tensor, nn

from graftwerk.methods.base import AdapterModule, TargetModule
from graftwerk.methods.linear_layers import LinearLayerMethod, Rank
from graftwerk.methods.low_rank import init_factors
from graftwerk.methods.target_modules import check_patterns, value_of
from graftwerk.methods.weight_update import WeightUpdate


class HiRAModule(WeightUpdate):
    """HiRA on one linear layer: h = W x + (W * B A) x.

    Args:
        base: The adapted layer, whose weight W is.
        a: A, (r, in).
        b: B, (out, r).
        p: Probability of dropping an entry of the update's input while training.

    Example:
        >>> import torch
        >>> layer, ones = nn.Linear(3, 2, bias=False), nn.Parameter(torch.ones(1, 3))
        >>> hira, x = HiRAModule(layer, ones, nn.Parameter(torch.ones(2, 1))), torch.ones(3)
        >>> torch.allclose(hira.post_forward(x, layer(x)), 2 * layer(x))
        True
    """

    def __init__(self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, p: float = 0.0) -> None:
        super().__init__(base, p)
        self.hira_A, self.hira_B = a, b

    def weight_update(self, weight: Tensor) -> Tensor:
        return weight.to(self.hira_A.dtype) * (self.hira_B @ self.hira_A)  # (out, in)


class HiRA(LinearLayerMethod):
    """Settings of HiRA.

    Example:
        >>> HiRA(r=8).num_parameters([TargetModule("q_proj", "query", 512, 512, False)])
        8192
    """

    name = "hira"
    title = "HiRA"
    paper = "Huang et al. 2025, OpenReview TwJrTz9cRS"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "HIRA"
    default_learning_rate = 3e-3

    r: Rank = Field(8, validation_alias=AliasChoices("r", "rank"), description="rank of B A")
    hira_dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("hira_dropout", "dropout"), description="on the update's input"
    )
    rank_pattern: dict[str, Rank] = Field({}, description="rank of modules by suffix, where it differs from r")

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        chosen = super().select_targets(available)
        check_patterns(chosen, rank_pattern=self.rank_pattern)
        return chosen

    def rank_at(self, path: str) -> int:
        """Return the rank r at a module."""
        return int(value_of(self.rank_pattern, path, self.r))

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        a, b = init_factors(target.in_features, target.out_features, self.rank_at(target.path), zero_b=True)
        return HiRAModule(module, a, b, self.hira_dropout)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of r (in + out)."""
        return sum(self.rank_at(t.path) * (t.in_features + t.out_features) for t in targets)
