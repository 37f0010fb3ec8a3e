"""Prefix tuning: learned keys and values in front of every attention.

Paper: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, sections
4.2 and 4.3:

    attention(Q, [P_k; K], [P_v; V])                             P_k, P_v: (n, G·D) trained, one pair for each attention
    re-parametrised:  [P_k; P_v] = W_a tanh(W e + b) + b_a       e: (n, d), W: (h, d), W_a: (2·G·D, h)

There is a pair in every attention of the model: of an encoder, of a decoder, and of its cross-attention; each is
trained on its own. e and W are shared by all attentions of a stack, W_a belongs to one attention. Every token sees
the prefix, also through a sliding window; a prefix token has no position of its own, but in decoder-only models the
text's positions begin after it.

Departures: the paper drops the network after training, here both forms can be stored. The paper's network has one W_a
for all layers; this is that matrix cut into blocks, so that each is used (and its gradient found) where it belongs.

Start: small random values (``init_std``), or the keys and values that the frozen model itself computes for a given
text (the paper, section 7.4). Small values are no identity: a key near zero has a score near zero, so the prefix draws
a share of the attention (n of n + T for a text of T tokens with scores like it) away to values near zero. They are the
default because a start from words taken at random reached less, see docs/decisions/0006. With the network, W_a is
chosen so that its output is that start (exactly, where n is at most h + 1).

Parameters: 2·n·G·D for each attention; with the network n·d + d·h + h for each stack and (h + 1)·2·G·D for each
attention.
Trade-off: tiny and never touches a weight, so that rows of a batch may have different prefixes; it lengthens every
attention by n and wants a learning rate a thousand times that of full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn

from graftwerk.methods.layer_selection import LayerSelection
from graftwerk.methods.soft_prompt import FromText


class Prefix(LayerSelection, FromText):
    """Settings of prefix tuning: the number of virtual tokens, their start, and the network that computes them.

    Example:
        >>> prefix = Prefix(num_virtual_tokens=10)
        >>> prefix.num_vector_parameters(attentions=[64] * 12, stacks=[64])
        15360
    """

    name = "prefix"
    title = "Prefix tuning"
    paper = "Li and Liang 2021, arXiv:2101.00190"
    kind = "attention"
    peft_type = "PREFIX_TUNING"
    default_learning_rate = 3e-2

    prefix_projection: bool = Field(
        default=False,
        validation_alias=AliasChoices("prefix_projection", "reparametrization", "reparameterization"),
        description="train the prefix through a small network (re-parametrisation) instead of directly",
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of a random start")
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="hidden width h of that network; None: the model's width"
    )

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.init == "text" and self.init_std != type(self).model_fields["init_std"].default:
            raise ValueError("`init_std` has no effect on a start from text")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("`encoder_hidden_size` has no effect without `prefix_projection`: there is no network")
        return self

    def positions(self, causal: bool) -> int:
        """Return n for decoder-only models, whose text begins after the prefix; elsewhere a prefix has no positions."""
        return self.num_virtual_tokens if causal else 0

    def num_vector_parameters(self, attentions: Iterable[int], stacks: Iterable[int]) -> int:
        """Return the number of trained parameters, by formula.

        Args:
            attentions: G·D of each attention.
            stacks: Input width d of each stack (one for an encoder or a decoder, two for an encoder-decoder).
        """
        n = self.num_virtual_tokens
        if not self.prefix_projection:
            return sum(2 * n * width for width in attentions)
        widths = list(stacks)
        # All stacks of a model are equally wide, so they have the same h.
        h = self.encoder_hidden_size or widths[0]
        return sum(n * d + d * h + h for d in widths) + sum((h + 1) * 2 * width for width in attentions)


class PrefixModule(nn.Module):
    """Abstract: the prefix of one attention. Final subclasses: `PrefixVectors`, `ProjectedPrefix`."""

    n: int
    """Number of virtual tokens."""

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, (n, G·D) each, as the attention sees them: after any rotation."""
        raise NotImplementedError

    def source_tensors(self) -> list[Tensor]:
        """Return all tensors, any shape, that the vectors are computed from."""
        return list(self.parameters())

    def merged_state(self) -> dict[str, Tensor]:
        """Return keys and values (n, G·D) by the names they are stored under without a network; detached copies."""
        with torch.no_grad():
            key, value = self.vectors()
        return {"prefix_key": key.detach().clone(), "prefix_value": value.detach().clone()}


class PrefixVectors(PrefixModule):
    """Keys and values trained directly.

    Args:
        key: Initial keys, (n, G·D).
        value: Initial values, (n, G·D).
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.n = key.shape[0]
        self.prefix_key = nn.Parameter(key.float().clone())
        self.prefix_value = nn.Parameter(value.float().clone())

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.prefix_key, self.prefix_value


class PrefixMLP(nn.Module):
    """The part of the network shared by all attentions of a stack: ``tanh(W e + b)``.

    Args:
        n: Number of virtual tokens.
        width: d, width of the embedding e (n, d).
        hidden: h, width of the output.
    """

    def __init__(self, n: int, width: int, hidden: int) -> None:
        super().__init__()
        self.prefix_embedding = nn.Parameter(torch.randn(n, width))
        self.prefix_hidden = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        """Return tanh(W e + b), (n, h)."""
        return torch.tanh(self.prefix_hidden(self.prefix_embedding))

    def merged_state(self) -> dict[str, Tensor]:
        """Return no tensors (any shape): only computed keys and values are stored without the network."""
        return {}


class ProjectedPrefix(PrefixModule):
    """Keys and values of one attention, computed by the stack's `PrefixMLP` and a linear layer of this attention's own.

    The network runs at each use: nothing is stored between a forward pass and its recomputation under checkpointing.

    Args:
        mlp: The stack's shared part.
        key: Keys at the start, (n, G·D).
        value: Values at the start, (n, G·D).
    """

    def __init__(self, mlp: PrefixMLP, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.n = key.shape[0]
        self.prefix_output = nn.Linear(mlp.prefix_hidden.out_features, 2 * key.shape[1])
        # In a tuple, so that the shared part is no child: it is registered at its stack, once.
        self._mlp = (mlp,)
        self._start_at(torch.cat((key, value), dim=1).float())

    @torch.no_grad()
    def _start_at(self, target: Tensor) -> None:
        """Apply the smallest change of the random weights after which the network gives ``target`` (n, 2·G·D)."""
        inputs = self._mlp[0]().cpu()
        inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1).double()
        output = self.prefix_output
        weight, bias = (each.cpu().double() for each in (output.weight, output.bias))
        missing = target.cpu().double() - (inputs[:, :-1] @ weight.T + bias)
        change = torch.linalg.pinv(inputs) @ missing
        output.weight.add_(change[:-1].T.float().to(output.weight.device))
        output.bias.add_(change[-1].float().to(output.bias.device))

    def source_tensors(self) -> list[Tensor]:
        return [*super().source_tensors(), *self._mlp[0].parameters()]

    def vectors(self) -> tuple[Tensor, Tensor]:
        key, value = self.prefix_output(self._mlp[0]().to(self.prefix_output.weight.device)).chunk(2, dim=-1)
        return key, value
