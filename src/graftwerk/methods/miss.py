"""MiSS: one small matrix that all shards of a layer's input share.

Paper: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
arXiv:2409.15371. The input is cut into shards of r entries (the last one filled with zeros), which all meet D:

    h = W x + D^T (x_1 + x_2 + ... + x_n)        x_i (r,), n = in / r shards; D (r, out) starts at zero

Variants, chosen by ``init_weights`` as in PEFT:

* ``mini``: D has ``mini_r`` columns only, which are repeated along the output.
* ``bat``: each block of W's rows has its own D_j (r, r), through which the weight goes too:
  W_ji becomes W_ji + W_ji D_j + D_j for the blocks W_ji (r, r) of W.

Parameters: r out for each adapted layer; mini has r mini_r.
Trade-off: half of LoRA's parameters at the same rank and one thin product a token in place of two, so it is faster and
needs less memory; one matrix for all shards can tell the entries of different shards apart only by W. Bat can do so,
for a pass over the whole weight in every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import ConfigError
from graftwerk.methods.base import AdapterModule, TargetModule
from graftwerk.methods.dropout import InputDropout
from graftwerk.methods.linear_layers import LinearLayerMethod, Rank
from graftwerk.methods.weight_update import WeightUpdate


class MiSSModule(InputDropout):
    """MiSS on one linear layer: h = W x + D^T (sum of the shards of x).

    Args:
        block: D, (r, out), or (r, mini_r) to be repeated along the output.
        out_features: out.
        p: Probability of dropping an entry of the input while training.

    Example:
        >>> miss = MiSSModule(nn.Parameter(torch.eye(2)), out_features=2)
        >>> miss.post_forward(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(2)).tolist()
        [4.0, 2.0]
    """

    def __init__(self, block: nn.Parameter, out_features: int, p: float = 0.0) -> None:
        super().__init__(p)
        self.miss_block, self.out_features = block, out_features

    def shared(self) -> Tensor:
        """Return D, (r, out)."""
        times = self.out_features // self.miss_block.shape[1]
        return self.miss_block if times == 1 else self.miss_block.tile(1, times)

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        r = self.miss_block.shape[0]
        h = F.pad(self.dropped(x, self.miss_block.dtype), (0, -x.shape[-1] % r))
        total = h.reshape(*x.shape[:-1], -1, r).sum(-2)  # (..., in) -> (..., n, r) -> (..., r)
        return y + F.linear(total, self.shared().T).to(y.dtype)  # (..., r) -> (..., out)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shared = self.shared().T  # (out, r)
        n = -(-weight.shape[1] // shared.shape[1])
        return (weight + shared.tile(1, n)[:, : weight.shape[1]]).to(weight.dtype), bias


class BatModule(WeightUpdate):
    """MiSS's variant Bat on one linear layer: W_ji becomes W_ji + W_ji D_j + D_j, in blocks of (r, r).

    Args:
        base: The adapted layer.
        block: D, (out / r, r, r).
        p: Probability of dropping an entry of the update's input while training.
    """

    def __init__(self, base: nn.Module, block: nn.Parameter, p: float = 0.0) -> None:
        super().__init__(base, p)
        self.miss_block = block

    def weight_update(self, weight: Tensor) -> Tensor:
        r = self.miss_block.shape[-1]
        blocks = weight.to(self.miss_block.dtype).view(-1, r, weight.shape[1] // r, r).transpose(1, 2)
        shared = self.miss_block[:, None]  # (out/r, 1, r, r)
        update = blocks @ shared + shared  # (out/r, in/r, r, r)
        return update.transpose(1, 2).reshape(weight.shape)


class MiSS(LinearLayerMethod):
    """Settings of MiSS and its variants.

    Example:
        >>> MiSS(r=16).num_parameters([TargetModule("q_proj", "query", 512, 256, False)])
        4096
    """

    name = "miss"
    title = "MiSS"
    paper = "Kang and Yin 2024, arXiv:2409.15371"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "MISS"
    default_learning_rate = 1e-3

    r: Rank = Field(
        16,
        validation_alias=AliasChoices("r", "rank"),
        description="entries of a shard; 16 costs what LoRA does at rank 8",
    )
    miss_dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("miss_dropout", "dropout"), description="on the update's input"
    )
    mini_r: Rank = Field(1, description="columns of D with init_weights: mini; must divide a layer's output")
    init_weights: Literal[True, "bat", "mini"] = Field(
        True, description="variant: true (D for all shards), bat (a D for each block of rows), mini (D repeated)"
    )

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        self._check_fit(target)
        if self.init_weights == "bat":
            block = nn.Parameter(torch.zeros(target.out_features // self.r, self.r, self.r))
            return BatModule(module, block, self.miss_dropout)
        width = self.mini_r if self.init_weights == "mini" else target.out_features
        return MiSSModule(nn.Parameter(torch.zeros(self.r, width)), target.out_features, self.miss_dropout)

    def _check_fit(self, target: TargetModule) -> None:
        """Raise ConfigError if a layer is too narrow for a shard, or cannot be cut into the variant's blocks."""
        ends = f"{target.path} has {target.in_features} inputs and {target.out_features} outputs"
        if self.r > target.in_features:
            raise ConfigError(f"a shard of {self.r} entries is wider than the input: {ends}", where="method.r")
        if self.init_weights == "bat" and (target.in_features % self.r or target.out_features % self.r):
            raise ConfigError(f"bat needs a layer that divides into blocks of {self.r}: {ends}", where="method.r")
        if self.init_weights == "mini" and target.out_features % self.mini_r:
            raise ConfigError(f"{self.mini_r} columns do not divide the output: {ends}", where="method.mini_r")

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of r out; of r mini_r with mini."""
        return sum(self.r * (self.mini_r if self.init_weights == "mini" else t.out_features) for t in targets)
