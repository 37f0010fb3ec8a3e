"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3:

    h = W x + (alpha / r) B A x        A (r, in) Kaiming-uniform, B (out, r) zero; dropout on the low-rank path only

Options, each from its own paper:

* ``use_rslora``: scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), so that large ranks keep
  learning.
* ``use_dora``: magnitude and direction apart (see dora.py).
* ``init_lora_weights="pissa"``: A and B start as the r largest singular directions of W (see pissa.py).
* ``init_lora_weights="qera"``: A and B are initialized to compensate for W's quantization error (see qera.py).
* ``target_parameters``: an update for each expert of a mixture-of-experts model (see lora_parameters.py).
* ``loraplus_lr_ratio``: B learns faster than A by this factor (Hayou et al. 2024, arXiv:2402.12354).
* ``trainable_token_indices``: single rows of the embedding train beside it (see trainable_tokens.py).

Parameters: r (in + out) for each adapted layer; DoRA adds out; each trained row of a table adds its width.
Trade-off: no cost at inference once merged, and the closest to full fine-tuning of the small methods; it touches every
adapted matrix, so a training step costs more than the parameter count suggests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn

from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.dora import DoRAModule
from graftwerk.methods.linear_layers import Rank
from graftwerk.methods.lora_parameters import ParameterLoRA, ParameterSelection
from graftwerk.methods.low_rank import LowRankModule, init_factors, low_rank_product, merged_product, share_dropout
from graftwerk.methods.pissa import PiSSAModule
from graftwerk.methods.target_modules import check_patterns, value_of
from graftwerk.methods.trainable_tokens import TokenSelection


class LoRAModule(LowRankModule):
    """LoRA on one linear layer: h = W x + s B A x.

    Args:
        a: A, (r, in).
        b: B, (out, r).
        scale: s.
        p: Probability of dropping an entry of the input while training.

    Example:
        >>> import torch
        >>> lora = LoRAModule(*init_factors(4, 3, rank=2, zero_b=True), scale=2.0)
        >>> lora.post_forward(torch.ones(4), torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the low-rank update.

        Args:
            x: Input of the base layer, (..., in).
            y: Its output, (..., out).

        Returns:
            y + s B A dropout(x), (..., out), in the dtype of ``y``.
        """
        a, b = self.lora_A.weight, self.lora_B.weight  # (r, in), (out, r)
        update = low_rank_product(self.dropped(x, a.dtype), a, b, self.scale)  # s B A dropout(x), (..., out)
        return y + update.to(y.dtype)

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return merged_product(weight, (self.lora_A.weight, self.lora_B.weight, self.scale)), bias


class LoRA(ParameterSelection, TokenSelection):
    """Settings of LoRA and its variants.

    ``target_modules``: ``"attention"`` (query, key, value and output projections), ``"all-linear"`` (every linear
    layer of the base model, heads left out), or a list of module names or suffixes (``["q_proj", "v_proj"]``).

    Example:
        >>> LoRA(r=8, target_modules="attention").scale_at("layers.0.q_proj")
        2.0
    """

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    kind = "layer"
    mergeable = True
    identity_at_start = True
    peft_type = "LORA"
    default_learning_rate = 1e-3

    r: Rank = Field(8, validation_alias=AliasChoices("r", "rank"), description="rank of the update")
    lora_alpha: float = Field(
        16, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="scale: alpha/r is applied"
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("lora_dropout", "dropout"), description="on the low-rank path"
    )
    use_rslora: bool = Field(False, description="scale alpha/sqrt(r) in place of alpha/r")
    use_dora: bool = Field(False, description="train magnitude and direction apart (DoRA)")
    init_lora_weights: bool | Literal["pissa", "qera"] = Field(
        True,
        description="true: B zero; pissa: the largest singular directions; qera: compensates for "
        "the error of nf4, weighted by the inputs of training rows; false: B random, no identity at start",
    )
    loraplus_lr_ratio: float = Field(1.0, ge=1, description="LoRA+: learning rate of B over that of A")
    rank_pattern: dict[str, Rank] = Field({}, description="rank of modules by suffix, where it differs from r")
    alpha_pattern: dict[str, float] = Field({}, description="alpha of modules by suffix, where it differs")

    @model_validator(mode="after")
    def _check_combination(self) -> LoRA:
        start = self.init_lora_weights if isinstance(self.init_lora_weights, str) else None
        if self.use_dora and start:
            raise ValueError(f"use_dora and init_lora_weights={start} exclude each other: both set the initial values")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: nothing would be adapted")
        variants = {"use_dora": self.use_dora, "lora_dropout": self.lora_dropout}
        self.refuse_variants(**variants, **({f"init_lora_weights={start}": True} if start else {}))
        return self

    @property
    def starts_from_errors(self) -> bool:
        return self.init_lora_weights == "qera"

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        chosen = super().select_targets(available)
        check_patterns(chosen, rank_pattern=self.rank_pattern, alpha_pattern=self.alpha_pattern)
        return chosen

    def rank_at(self, path: str) -> int:
        """Return the rank r at a module."""
        return int(value_of(self.rank_pattern, path, self.r))

    def scale_at(self, path: str) -> float:
        """Return s at a module: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank, alpha = self.rank_at(path), float(value_of(self.alpha_pattern, path, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        if target.is_table:
            return self.build_rows(target, module)
        rank = self.rank_at(target.path) * target.experts
        # Drawn for PiSSA too: what is drawn after it, such as a head, does not depend on how factors start.
        a, b = init_factors(target.in_features, target.out_features, rank, zero_b=self.init_lora_weights is not False)
        if self.init_lora_weights == "pissa":
            return PiSSAModule.from_base(target, module, rank, self.scale_at(target.path), self.lora_dropout)
        return self._with_factors(target, module, a, b)

    def build_from(
        self, target: TargetModule, module: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> AdapterModule | None:
        if target.is_table:
            return self.build_rows_from(target, module, parameters)
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")[: 3 if self.use_dora else 2]
        if self.init_lora_weights == "pissa" or parameters.keys() != {*names}:
            return None
        a, b, *magnitude = (parameters[name] for name in names)
        rank = self.rank_at(target.path) * target.experts
        if a.shape != (rank, target.in_features) or b.shape != (target.out_features, rank):
            return None
        return self._with_factors(target, module, a, b, *magnitude)

    def _with_factors(
        self,
        target: TargetModule,
        module: nn.Module,
        a: nn.Parameter,
        b: nn.Parameter,
        magnitude: nn.Parameter | None = None,
    ) -> AdapterModule:
        """Return the module with A (r, in), B (out, r) and, for DoRA, its magnitude (out,) if it is stored already."""
        scale = self.scale_at(target.path)
        if target.role is Role.PARAMETER:
            return ParameterLoRA.from_base(target, module, a, b, scale)
        if not self.use_dora:
            return LoRAModule(a, b, scale, self.lora_dropout)
        if magnitude is None:
            return DoRAModule.from_base(module, a, b, scale, self.lora_dropout)
        return DoRAModule(module, a, b, magnitude, scale, self.lora_dropout)

    def connect(self, targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> None:
        super().connect(targets, built)
        share_dropout(targets, built)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of r (in + out) over the targets, times E for a parameter, another out with DoRA, and rows."""
        return sum(
            self.num_row_parameters(t)
            if t.is_table
            else self.rank_at(t.path) * t.experts * (t.in_features + t.out_features) + t.out_features * self.use_dora
            for t in targets
        )

    def learning_rate_factor(self, parameter: str) -> float:
        return self.loraplus_lr_ratio if "lora_B" in parameter else 1.0
