"""The trained product of two thin matrices that LoRA and its relatives share.

    s B A dropout(x)        A (r, in), B (out, r)

Legend: r rank, s scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.methods.base import ATTENTION_ROLES, AdapterModule, Role, SmallModule, TargetModule
from graftwerk.methods.dropout import DropoutGroup, InputDropout


class Factor(SmallModule):
    """One matrix, named ``weight`` as in PEFT's files (``lora_A.weight``); any shape."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._parameters["weight"] = weight  # past the checks of `__setattr__`: loading makes hundreds of them


class LowRankModule(InputDropout):
    """Abstract: an adapter module with factors ``lora_A`` (r, in) and ``lora_B`` (out, r).

    Args:
        a: A, (r, in).
        b: B, (out, r).
        scale: s.
        p: Probability of dropping an entry of the input while training.
    """

    lora_A: Factor  # noqa: N815 - as in PEFT's files
    lora_B: Factor  # noqa: N815
    scale: float

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, p: float = 0.0) -> None:
        super().__init__(p)
        self._modules["lora_A"], self._modules["lora_B"] = Factor(a), Factor(b)  # as in `Factor`
        self.__dict__["scale"] = scale


READ_TOGETHER = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.FFN_IN, Role.FFN_GATE})
"""Roles of modules that may read the same tensor within one block; LoRA drops the same of its entries for all."""


def share_dropout(targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> None:
    """Join the dropout of low-rank modules that may read the same tensor."""
    groups: dict[tuple[str, bool], DropoutGroup] = {}
    for target in targets:
        module = built[target.path]
        if target.role in READ_TOGETHER and isinstance(module, LowRankModule):
            key = target.path.rpartition(".")[0], target.role in ATTENTION_ROLES
            module.__dict__["group"] = groups.setdefault(key, module.group)  # as in `Factor`


def low_rank_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale B A x.

    Args:
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scale: Factor on the product.

    Returns:
        (..., out).
    """
    # Scaled on the thin side: r values a token in place of `out`.
    return F.linear(F.linear(x, a) * scale, b)  # (..., in) -> (..., r) -> (..., out)


def init_factors(in_features: int, out_features: int, rank: int, *, zero_b: bool) -> tuple[nn.Parameter, nn.Parameter]:
    """Draw A (r, in), Kaiming-uniform, and B (out, r), the same or zero, from torch's generator.

    B is drawn before it is zeroed, as in PEFT: the same seed gives the same A's.
    """
    a, b = torch.empty(rank, in_features), torch.empty(out_features, rank)
    for factor in (a, b):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    if zero_b:
        nn.init.zeros_(b)
    return nn.Parameter(a), nn.Parameter(b)


def merged_product(weight: Tensor, *terms: tuple[Tensor, Tensor, float]) -> Tensor:
    """Return W + sum of s B A in the dtype of W: one pass over W, in the finer of both precisions, rounded once.

    Args:
        weight: W, (out, in).
        *terms: A (r, in), B (out, r) and s of each product.
    """
    fine = torch.promote_types(weight.dtype, terms[0][0].dtype)
    (a, b, scale), *others = terms
    merged = torch.addmm(weight.to(fine), b.to(fine), a.to(fine), alpha=scale)  # (out, in)
    for a, b, scale in others:
        merged.addmm_(b.to(fine), a.to(fine), alpha=scale)
    return merged.to(weight.dtype)
