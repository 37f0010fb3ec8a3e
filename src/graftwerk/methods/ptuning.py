"""P-tuning: input embeddings in front of the text, computed by a small network.

Paper: Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3.2:

    P_i = MLP([h_i→ ; h_i←]),   h = LSTM(e)        or, without the recurrence,   P_i = MLP(e_i)      e: (n, d) trained
    model([P; E(x)])

The networks are those of PEFT, parameter by parameter: the plain one has three linear layers with ReLU between, the
recurrent one two linear layers after a bidirectional LSTM.

Start: noise, as in PEFT, but with the biases before a ReLU shifted to the middle of its inputs. Otherwise up to half
of the units are off for all n tokens, and a unit that is off for all of them gets no gradient.

Parameters, hidden width h: n·d + (d·h + h) + (h·h + h) + (h·d + d) for the MLP; for the LSTM n·d + its two
directions, 8·h·(d + h + 2) for its first layer and 8·h·(3·h + 2) for each further one, + (4·h·h + 2·h) + (2·h·d + d).
Trade-off: the network makes training steadier than prompt tuning's bare vectors and can be thrown away afterwards;
while training it is many times larger than what it makes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graftwerk.methods.prompt_tuning import PromptModule, PromptVectors
from graftwerk.methods.soft_prompt import VirtualTokens


class PTuning(VirtualTokens):
    """Settings of P-tuning: the number of virtual tokens and the network that computes them.

    Example:
        >>> PTuning(num_virtual_tokens=4, encoder_hidden_size=8).num_vector_parameters(width=16)
        416
    """

    name = "ptuning"
    title = "P-tuning"
    paper = "Liu et al. 2021, arXiv:2103.10385"
    kind = "embedding"
    peft_type = "P_TUNING"
    default_learning_rate = 3e-3

    encoder_reparameterization_type: Literal["MLP", "LSTM", "NONE"] = Field(
        default="MLP",
        description="the network that makes the virtual tokens; NONE: bare vectors, as stored without a network",
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="its hidden width h; None: the model's width"
    )
    encoder_num_layers: int = Field(default=2, ge=1, description="layers of the LSTM")
    encoder_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout between the layers of the LSTM")

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        kind = self.encoder_reparameterization_type
        if kind != "LSTM" and self.encoder_num_layers != 2:
            raise ValueError(f"`encoder_num_layers` has no effect with {kind}: only the LSTM has layers to count")
        if self.encoder_dropout and (kind != "LSTM" or self.encoder_num_layers == 1):
            raise ValueError(
                "`encoder_dropout` works between the layers of an LSTM, and there is only one layer or none"
            )
        if kind == "NONE" and self.encoder_hidden_size is not None:
            raise ValueError("`encoder_hidden_size` has no effect with NONE: there is no network")
        return self

    def num_vector_parameters(self, width: int) -> int:
        """Return the number of trained parameters, by formula; ``width`` is d."""
        n, d = self.num_virtual_tokens, width
        h = self.encoder_hidden_size or d
        if self.encoder_reparameterization_type == "NONE":
            return n * d
        if self.encoder_reparameterization_type == "MLP":
            return n * d + (d * h + h) + (h * h + h) + (h * d + d)
        lstm = 8 * h * (d + h + 2) + (self.encoder_num_layers - 1) * 8 * h * (3 * h + 2)
        return n * d + lstm + (4 * h * h + 2 * h) + (2 * h * d + d)

    def build_prompt(self, embedding: nn.Module, width: int) -> PromptModule:
        """Build the prompt of one adapter for input width d; it starts from noise, not from ``embedding``."""
        if self.encoder_reparameterization_type == "NONE":
            return PromptVectors(torch.randn(self.num_virtual_tokens, width))
        return PromptEncoder(
            self.num_virtual_tokens,
            width,
            self.encoder_hidden_size or width,
            recurrent_layers=self.encoder_num_layers if self.encoder_reparameterization_type == "LSTM" else 0,
            dropout=self.encoder_dropout,
        )


class PromptEncoder(PromptModule):
    """The network that computes the virtual tokens; its parameters are named as in PEFT's prompt encoder.

    Args:
        n: Number of virtual tokens.
        width: d, input width of the model.
        hidden: h, hidden width of the network.
        recurrent_layers: Layers of the LSTM; 0 for the plain MLP.
        dropout: Between the layers of the LSTM.
    """

    def __init__(self, n: int, width: int, hidden: int, *, recurrent_layers: int, dropout: float) -> None:
        super().__init__()
        self.n = n
        self.embedding = nn.Embedding(n, width)
        if recurrent_layers:
            self.lstm_head = nn.LSTM(
                width, hidden, recurrent_layers, dropout=dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
        self._wake()

    @torch.no_grad()
    def _wake(self) -> None:
        """Shift the biases so that each unit of a ReLU is on for some of the virtual tokens and off for others."""
        hidden_states = self._before_mlp()
        for layer, following in pairwise(self.mlp_head):
            if isinstance(layer, nn.Linear) and isinstance(following, nn.ReLU):
                inputs = layer(hidden_states)
                # With one token there is no middle; it is mirrored to the side where the unit is on.
                layer.bias.sub_(inputs.mean(dim=0) if self.n > 1 else inputs[0] - inputs[0].abs())
            hidden_states = layer(hidden_states)

    def _before_mlp(self) -> Tensor:
        hidden_states: Tensor = self.embedding.weight
        if hasattr(self, "lstm_head"):
            hidden_states = self.lstm_head(hidden_states[None])[0][0]
        return hidden_states

    def vectors(self) -> Tensor:
        output: Tensor = self.mlp_head(self._before_mlp())
        return output
