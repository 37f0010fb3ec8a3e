"""Prefix tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from graftwerk.methods.virtual import FromText


class Prefix(FromText):
    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning"
    paper: ClassVar[str] = "Li and Liang 2021, https://arxiv.org/abs/2101.00190"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "attention"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2

    prefix_projection: bool = Field(
        default=False,
        validation_alias=AliasChoices("prefix_projection", "reparametrization", "reparameterization"),
        description="train the prefix through a small network (re-parametrisation) instead of directly",
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="hidden width of that network; None: the model's width"
    )
