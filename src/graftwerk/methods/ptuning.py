"""P-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftwerk.methods.virtual import VirtualTokens


class PTuning(VirtualTokens):
    name: ClassVar[str] = "ptuning"
    title: ClassVar[str] = "P-tuning"
    paper: ClassVar[str] = "Liu et al. 2021, https://arxiv.org/abs/2103.10385"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "embedding"
    peft_type: ClassVar[str | None] = "P_TUNING"
    default_learning_rate: ClassVar[float] = 3e-3

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        default="MLP", description="the network that the virtual tokens are computed by"
    )
    encoder_hidden_size: int | None = Field(default=None, ge=1, description="its hidden width; None: the model's width")
    encoder_num_layers: int = Field(default=2, ge=1, description="layers of the LSTM")
    encoder_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout between the LSTM's layers")
