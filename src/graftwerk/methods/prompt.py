"""Prompt tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftwerk.methods.virtual import FromText


class Prompt(FromText):
    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "Lester, Al-Rfou and Constant 2021, https://arxiv.org/abs/2104.08691"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "embedding"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2
