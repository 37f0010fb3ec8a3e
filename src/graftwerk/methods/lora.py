"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3:

    h = W x + (alpha / r) B A x        A (r, in) Kaiming-uniform, B (out, r) zero; dropout on the low-rank path only

Options, each from its own paper:

* ``use_rslora``: scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), so that large ranks keep
  learning.
* ``use_dora``: magnitude and direction apart (see dora.py).
* ``init_lora_weights="pissa"``: A and B start as the r largest singular directions of W (Meng et al. 2024,
  arXiv:2404.02948, equations 2-4). The paper moves the rest into W; here W stays as it is and the start is subtracted:
  h = W x + s (B A - B0 A0) x, which is the same function and leaves the base untouched.
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
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, field_validator, model_validator
from torch import Tensor, nn

from graftwerk.errors import ConfigError
from graftwerk.methods.base import AdapterModule, Role, TargetModule, base_weight
from graftwerk.methods.dora import DoRAModule
from graftwerk.methods.lora_parameters import ParameterLoRA, ParameterSelection
from graftwerk.methods.low_rank import LowRankModule, init_factors, low_rank_product, pissa_init, share_dropout
from graftwerk.methods.target_modules import check_inputs, check_patterns, check_targets, linear_targets, value_of
from graftwerk.methods.trainable_tokens import (
    TokenIndices,
    build_rows,
    checked_indices,
    connect_rows,
    num_row_parameters,
    rows_by_table,
    stored_rows,
    token_indices,
)

Rank = Annotated[int, Field(ge=1, le=65536)]


class LoRAModule(LowRankModule):
    """LoRA on one linear layer: h = W x + s B A x, and with PiSSA - s B0 A0 x.

    Args:
        a: A, (r, in).
        b: B, (out, r).
        scale: s.
        p: Probability of dropping an entry of the input while training.
        start: A0 (r, in) and B0 (out, r), which do not train; empty if B A starts at zero.

    Example:
        >>> lora = LoRAModule(*init_factors(4, 3, rank=2, zero_b=True), scale=2.0)
        >>> lora.post_forward(torch.ones(4), torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self, a: nn.Parameter, b: nn.Parameter, scale: float, p: float = 0.0, start: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(a, b, scale, p)
        self.pissa = bool(start)
        for name, factor in zip(("start_A", "start_B"), start, strict=False):
            self.register_buffer(name, factor)

    def start(self) -> tuple[Tensor, Tensor]:
        """Return A0 (r, in) and B0 (out, r), which PiSSA subtracts."""
        return self.get_buffer("start_A"), self.get_buffer("start_B")

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the low-rank update.

        Args:
            x: Input of the base layer, (..., in).
            y: Its output, (..., out).

        Returns:
            y + s B A dropout(x), (..., out), in the dtype of ``y``.
        """
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """Return s B A dropout(x), with PiSSA minus s B0 A0 dropout(x): (..., out) for x (..., in), in A's dtype."""
        h = self.dropped(x, self.lora_A.weight.dtype)
        update = low_rank_product(h, self.lora_A.weight, self.lora_B.weight, self.scale)
        return update - low_rank_product(h, *self.start(), self.scale) if self.pissa else update

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # One pass over the weight, in the finer of both precisions, so that W + s B A is rounded once.
        a, b = self.lora_A.weight, self.lora_B.weight
        fine = torch.promote_types(weight.dtype, a.dtype)
        merged = torch.addmm(weight.to(fine), b.to(fine), a.to(fine), alpha=self.scale)  # (out, in)
        if self.pissa:
            a0, b0 = self.start()
            merged.addmm_(b0.to(fine), a0.to(fine), alpha=-self.scale)
        return merged.to(weight.dtype), bias


class LoRA(ParameterSelection):
    """Settings of LoRA and its variants.

    ``target_modules``: ``"attention"`` (query, key, value and output projections), ``"all-linear"`` (every linear
    layer of the base model, heads left out), or a list of module names or suffixes (``["q_proj", "v_proj"]``).

    Example:
        >>> LoRA(r=8, target_modules="attention").scale("layers.0.q_proj")
        2.0
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "layer"
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    default_learning_rate: ClassVar[float] = 1e-3

    r: Rank = Field(8, validation_alias=AliasChoices("r", "rank"), description="rank of the update")
    lora_alpha: float = Field(
        16, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="scale: alpha/r is applied"
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("lora_dropout", "dropout"), description="on the low-rank path"
    )
    target_modules: tuple[str, ...] | Literal["attention", "all-linear"] = Field(
        "all-linear", description="attention, all-linear, or names or suffixes of linear layers"
    )
    use_rslora: bool = Field(False, description="scale alpha/sqrt(r) in place of alpha/r")
    use_dora: bool = Field(False, description="train magnitude and direction apart (DoRA)")
    init_lora_weights: bool | Literal["pissa"] = Field(
        True, description="true: B zero; pissa: the largest singular directions; false: B random, no identity at start"
    )
    loraplus_lr_ratio: float = Field(1.0, ge=1, description="LoRA+: learning rate of B over that of A")
    rank_pattern: dict[str, Rank] = Field({}, description="rank of modules by suffix, where it differs from r")
    alpha_pattern: dict[str, float] = Field({}, description="alpha of modules by suffix, where it differs")

    trainable_token_indices: TokenIndices | None = Field(
        None,
        description="token ids whose rows of the input embedding train too (of new special tokens, say), or lists of "
        "them by the names of embeddings",
    )

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _token_indices(cls, value: Any) -> Any:
        return checked_indices(value)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("attention", "all-linear"):
            return (value,)
        return tuple(value) if isinstance(value, list | set) else value

    @model_validator(mode="after")
    def _fits(self) -> LoRA:
        if self.use_dora and self.init_lora_weights == "pissa":
            raise ValueError("use_dora and init_lora_weights=pissa exclude each other: both redefine the start")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: nothing would be adapted")
        pissa = self.init_lora_weights == "pissa"
        self.refuse_variants(use_dora=self.use_dora, lora_dropout=self.lora_dropout, pissa=pissa)
        return self

    def select_targets(self, available: Sequence[TargetModule]) -> list[TargetModule]:
        modules = [target for target in available if target.role is not Role.PARAMETER]
        chosen = linear_targets(modules, self.target_modules) if self.target_modules else []
        chosen = self.filter_layers(chosen, modules) if chosen else []
        if isinstance(self.target_modules, tuple):
            check_targets(chosen, self.target_modules)
        chosen += self.select_parameters(available, chosen)
        check_patterns(chosen, rank_pattern=self.rank_pattern, alpha_pattern=self.alpha_pattern)
        if self.lora_dropout:
            check_inputs(chosen, "lora_dropout")
        return chosen

    def trained_rows(self, tables: Sequence[TargetModule]) -> dict[str, tuple[int, ...]]:
        return rows_by_table(tables, self.trainable_token_indices)

    def rank(self, path: str) -> int:
        """Return the rank r at a module."""
        return int(value_of(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """Return s at a module: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(path), float(value_of(self.alpha_pattern, path, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def build(self, target: TargetModule, module: nn.Module) -> AdapterModule:
        if target.is_table:
            return build_rows(target, module, token_indices(target, self.trainable_token_indices))
        rank, scale = self.rank(target.path) * target.experts, self.scale(target.path)
        a, b = init_factors(target.in_features, target.out_features, rank, zero_b=self.init_lora_weights is True)
        if target.role is Role.PARAMETER:
            return ParameterLoRA.of(target, module, a, b, scale)
        if self.use_dora:
            return DoRAModule.around(module, a, b, scale, self.lora_dropout)
        if self.init_lora_weights != "pissa":
            return LoRAModule(a, b, scale, self.lora_dropout)
        if rank > (most := min(target.in_features, target.out_features)):
            raise ConfigError(f"PiSSA takes {rank} singular directions, but {target.path} has {most}", where="method.r")
        start = pissa_init(base_weight(module), rank, scale)
        a, b = (nn.Parameter(factor.clone()) for factor in start)
        return LoRAModule(a, b, scale, self.lora_dropout, start)

    def build_from(
        self, target: TargetModule, module: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> AdapterModule | None:
        if target.is_table:
            return stored_rows(target, module, token_indices(target, self.trainable_token_indices), parameters)
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")[: 3 if self.use_dora else 2]
        if self.init_lora_weights == "pissa" or parameters.keys() != {*names}:
            return None
        a, b, *magnitude = (parameters[name] for name in names)
        rank, scale = self.rank(target.path) * target.experts, self.scale(target.path)
        if a.shape != (rank, target.in_features) or b.shape != (target.out_features, rank):
            return None
        if target.role is Role.PARAMETER:
            return ParameterLoRA.of(target, module, a, b, scale)
        if self.use_dora:
            return DoRAModule(module, a, b, magnitude[0], scale, self.lora_dropout)
        return LoRAModule(a, b, scale, self.lora_dropout)

    def connect(self, targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> None:
        connect_rows(targets, built)
        share_dropout(targets, built)

    def num_parameters(self, targets: Iterable[TargetModule]) -> int:
        """Return the sum of r (in + out) over the targets, times E for a parameter, another out with DoRA, and rows."""
        return sum(
            num_row_parameters(t, self.trainable_token_indices)
            if t.is_table
            else self.rank(t.path) * t.experts * (t.in_features + t.out_features) + t.out_features * self.use_dora
            for t in targets
        )

    def learning_rate_factor(self, parameter: str) -> float:
        return self.loraplus_lr_ratio if "lora_B" in parameter else 1.0
