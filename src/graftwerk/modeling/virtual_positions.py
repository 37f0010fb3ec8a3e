"""Virtual tokens in a batch: which modules each row uses, and what a stack does about positions.

Shared by prefixes (`attention.py`) and prompts (`embedding.py`).
Legend: B rows of the batch, T tokens of the text, n virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graftwerk.errors import ModelError
from graftwerk.modeling.adapter_slots import AdapterSlots, ModelAdapters
from graftwerk.modeling.architectures import is_causal

Virtual = TypeVar("Virtual", bound=nn.Module)


def users(box: AdapterSlots, kind: type[Virtual], size: int) -> tuple[list[list[Virtual]], int]:
    """The active modules of one kind at a host for each named row, and how many rows of the batch each stands for.

    Where all rows use the same adapters there is one named row, which stands for the whole batch of ``size``.
    """
    selection = box.selection
    if selection.rows is None:
        return [[module for module in box.active() if isinstance(module, kind)]], size
    repeats = selection.repeats(size)
    return [[module] if isinstance(module := box.get(name), kind) else [] for name in selection.rows], repeats


def lengths(rows: Sequence[Sequence[Any]]) -> list[int]:
    """n of each named row."""
    return [sum(module.n for module in row) for row in rows]


def gathered(rows: Sequence[Sequence[Virtual]], repeats: int, device: torch.device) -> tuple[list[Virtual], Tensor]:
    """How to lay out the vectors of rows that differ, in one lookup.

    Returns:
        The distinct modules, and (B, n) indices into their vectors one after the other. Where a row has less than the
        most n, its last columns point at some vector that is not its own; a mask has to hide them.
    """
    distinct = list(dict.fromkeys(module for row in rows for module in row))
    starts = dict(zip(distinct, accumulate(lengths([[module] for module in distinct]), initial=0), strict=False))
    most = max(lengths(rows))
    index = [[starts[module] + i for module in row for i in range(int(module.n))] for row in rows]  # type: ignore[arg-type]
    filled = torch.tensor([row + [0] * (most - len(row)) for row in index], device=device)
    return distinct, filled.repeat_interleave(repeats, dim=0)


def per_row(values: Sequence[int], repeats: int, device: torch.device) -> Tensor:
    """(B, 1) from one value for each named row."""
    return torch.tensor(values, device=device).repeat_interleave(repeats).unsqueeze(1)


@dataclass(frozen=True)
class VirtualLayout:
    """The place of each row's virtual tokens among its real ones; S = n + T.

    Attributes:
        n: Virtual tokens of the row that has most.
        counts: (B, 1), virtual tokens of each row.
        leads: (B, 1), padding in front of each row's text; None where there is none.
        causal: Whether rows end, and not begin, at the same place.
        even: Whether all rows have n virtual tokens.
    """

    n: int
    counts: Tensor
    leads: Tensor | None
    causal: bool
    even: bool

    def merge(self, virtual: Tensor, real: Tensor) -> Tensor:
        """(B, n, ...) and (B, T, ...) -> (B, S, ...), zeros where a row has neither."""
        if self.even and self.leads is None:
            return torch.cat((virtual, real), dim=1)
        nothing = torch.zeros_like(real[:, :1])
        index = self._index(real.shape[1], real.device)
        index = index.view(*index.shape, *[1] * (real.dim() - 2)).expand(-1, -1, *real.shape[2:])
        return torch.cat((virtual, real, nothing), dim=1).gather(1, index)

    def _index(self, tokens: int, device: torch.device) -> Tensor:
        """(B, S): for each position of the result, where in [virtual; real; nothing] its value is."""
        place = torch.arange(self.n + tokens, device=device)[None]
        if self.causal:
            leads = 0 if self.leads is None else self.leads
            which, token = place - (leads + self.n - self.counts), place - self.n
            is_real = token >= leads
        else:
            which, token = place, place - self.counts
            is_real = (token >= 0) & (token < tokens)
        is_virtual = (which >= 0) & (which < self.counts)
        nothing = torch.full_like(which.expand(len(self.counts), -1), self.n + tokens)
        return torch.where(is_virtual, which, torch.where(is_real, self.n + token, nothing))

    def mask(self, real: Tensor) -> Tensor:
        """(B, T) -> (B, S); virtual tokens are seen."""
        return self.merge(real.new_ones(real.shape[0], self.n), real)

    def text_of(self, states: Tensor) -> Tensor:
        """(B, S, ...) -> (B, T, ...): the states at the text's positions."""
        if self.causal or self.even:
            return states[:, self.n :]
        tokens = states.shape[1] - self.n
        index = self.counts + torch.arange(tokens, device=states.device)[None]
        return states.gather(1, index.view(*index.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:]))


@cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def inputs_of(stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, however they were passed."""
    return {**dict(zip(_parameters(type(stack).forward), args, strict=False)), **kwargs}


def accepts(stack: nn.Module, name: str) -> bool:
    return name in _parameters(type(stack).forward)


def cached_tokens(inputs: Mapping[str, Any]) -> int:
    """Positions that the cache of a call holds already; 0 without a cache."""
    past = inputs.get("past_key_values")
    return 0 if past is None else int(past.get_seq_length())


def size_of(inputs: Mapping[str, Any]) -> tuple[int, int, torch.device]:
    """(B, T, device) of a call."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tensor = ids if ids is not None else embeds
    if tensor is None:
        raise ModelError("the model was called with neither input_ids nor inputs_embeds")
    return tensor.shape[0], tensor.shape[1], tensor.device


def own_positions(stack: nn.Module, inputs: Mapping[str, Any], past: int) -> Tensor:
    """The position ids (B or 1, T) that the stack would use if nobody changed the call.

    Args:
        past: Tokens of the text, virtual ones not counted, that the cache holds.
    """
    if (given := inputs.get("position_ids")) is not None:
        return torch.as_tensor(given)
    _, tokens, device = size_of(inputs)
    if numbers_from_ids(stack):
        embeddings: Any = stack.embeddings
        padding = embeddings.padding_idx
        if (ids := inputs.get("input_ids")) is not None:
            return torch.as_tensor(embeddings.create_position_ids_from_input_ids(ids, padding, past))
        return torch.arange(padding + 1, padding + 1 + tokens, device=device).unsqueeze(0)
    mask = inputs.get("attention_mask")
    if _counts_by_mask(stack) and mask is not None:
        counted = mask.long().cumsum(dim=1)
        return torch.as_tensor(counted * mask.long() - 1)[:, -tokens:]
    return torch.arange(past, past + tokens, device=device).unsqueeze(0)


def numbers_from_ids(stack: nn.Module) -> bool:
    """RoBERTa and its kin number tokens from the padding id on, and leave padding out."""
    return hasattr(getattr(stack, "embeddings", None), "create_position_ids_from_input_ids")


def _counts_by_mask(stack: nn.Module) -> bool:
    """OPT counts positions by the mask, so that padding at the left has none."""
    return type(getattr(stack, "embed_positions", None)).__name__ == "OPTLearnedPositionalEmbedding"


def first_position(stack: nn.Module) -> int:
    """The position id of a row's first token."""
    embeddings: Any = stack.embeddings if numbers_from_ids(stack) else None
    return 0 if embeddings is None else int(embeddings.padding_idx) + 1


def positions_taken(model: Any) -> int:
    """Return how many of the model's positions the virtual tokens of its active adapters take before the text."""
    record = ModelAdapters.of(model)
    if record is None:
        return 0
    causal = is_causal(model.config)
    return sum(record.adapters[name].method.positions(causal) for name in record.selection.used())


def check_positions(stack: nn.Module, virtual: int, text: int) -> None:
    """Refuse rows that are longer, virtual tokens included, than a model with a table of positions can number.

    Raises:
        ModelError: with the number of tokens that do fit.
    """
    table = getattr(getattr(stack, "embeddings", None), "position_embeddings", None)
    if table is None:
        table = getattr(stack, "wpe", getattr(stack, "embed_positions", None))
    if not isinstance(table, nn.Embedding):
        return  # positions are computed: rotary, relative, or made as needed
    room = table.num_embeddings - int(getattr(table, "offset", first_position(stack)))
    if virtual + text > room:
        raise ModelError(
            f"{text} tokens of text and {virtual} virtual tokens are more than the {room} positions that"
            f" {type(stack).__name__} has",
            hint=f"cut texts to {max(room - virtual, 0)} tokens, or use fewer virtual tokens",
        )
