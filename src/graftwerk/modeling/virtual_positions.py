"""Virtual tokens in a batch: the modules that each row uses, and the positions of a stack.

Shared by prefixes (`prefix_attention.py`) and prompts (`prompt_embedding.py`).
Legend: B rows of the batch, T tokens of the text, n virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ModelError
from graftwerk.modeling.adapter_slots import AdapterSlots, ModelAdapters
from graftwerk.modeling.module_names import is_causal


class VirtualTokens(Protocol):
    """An adapter module with virtual tokens."""

    n: int
    """Their number."""


Virtual = TypeVar("Virtual", bound=VirtualTokens)


class VirtualRows(Generic[Virtual]):
    """The virtual tokens that each row of a batch uses at one place of the model.

    Rows are listed as adapters were chosen for them: each named row stands for ``repeats`` rows of the batch. If all
    rows use the same adapters there is one named row, which stands for the whole batch.

    Args:
        slots: Slots of the module that the virtual tokens belong to.
        kind: Class of the adapter modules that hold them.
        size: B.
    """

    def __init__(self, slots: AdapterSlots, kind: type[Virtual], size: int) -> None:
        selection = slots.selection
        if selection.rows is None:
            self.modules, self.repeats = [[module for module in slots.active() if isinstance(module, kind)]], size
        else:
            found = [slots.get(name) for name in selection.rows]
            self.modules = [[module] if isinstance(module, kind) else [] for module in found]
            self.repeats = selection.repeats(size)
        self.counts = [sum(module.n for module in row) for row in self.modules]

    @property
    def n(self) -> int:
        """Virtual tokens of the row that has most."""
        return max(self.counts)

    @property
    def differ(self) -> bool:
        """True if rows were given adapters of their own."""
        return len(self.modules) > 1

    def gather(self, device: torch.device) -> tuple[list[Virtual], Tensor]:
        """Lay out the vectors of rows that differ, for one lookup.

        Returns:
            The distinct modules, and (B, n) indices into their vectors one after the other. If a row has fewer than n,
            its last columns point at some vector that is not its own; a mask has to hide them.
        """
        distinct = list(dict.fromkeys(module for row in self.modules for module in row))
        starts = dict(zip(distinct, accumulate((module.n for module in distinct), initial=0), strict=False))
        index = [[starts[module] + i for module in row for i in range(module.n)] for row in self.modules]
        filled = torch.tensor([row + [0] * (self.n - len(row)) for row in index], device="cpu")
        return distinct, filled.repeat_interleave(self.repeats, dim=0).to(device, non_blocking=True)

    def layout(self, leads: Tensor | None, causal: bool, device: torch.device) -> VirtualLayout:
        """Return the positions of the virtual tokens; arguments as for `VirtualLayout`, ``leads`` (B, 1)."""
        return VirtualLayout(self.n, counts_of(self.counts, self.repeats, device), leads, causal)


def per_row(values: Sequence[int], repeats: int, device: torch.device) -> Tensor:
    """Return (B, 1) from one value for each named row."""
    return torch.tensor(values, device="cpu").repeat_interleave(repeats).unsqueeze(1).to(device, non_blocking=True)


def counts_of(values: Sequence[int], repeats: int, device: torch.device) -> Tensor | int:
    """Return (B, 1) from one number for each named row, or the number itself if all are equal."""
    return values[0] if len(set(values)) == 1 else per_row(values, repeats, device)


@dataclass(frozen=True)
class VirtualLayout:
    """The positions of each row's virtual tokens among its real ones; S = n + T.

    Attributes:
        n: Virtual tokens of the row that has most.
        counts: (B, 1), virtual tokens of each row, or n if all have as many.
        leads: (B, 1), padding in front of each row's text, or None if there is certainly none.
        causal: True if rows end, and not begin, at the same position.
    """

    n: int
    counts: Tensor | int
    leads: Tensor | None
    causal: bool

    @property
    def even(self) -> bool:
        """True if all rows have n virtual tokens."""
        return isinstance(self.counts, int)

    def merge(self, virtual: Tensor, real: Tensor) -> Tensor:
        """Merge virtual (B, n, ...) and real (B, T, ...) to (B, S, ...), zeros where a row has neither."""
        if self.even and self.leads is None:
            return torch.cat((virtual, real), dim=1)
        nothing = torch.zeros_like(real[:, :1])
        index = self._index(real.shape[0], real.shape[1], real.device)
        row = torch.arange(len(real), device=real.device)[:, None]
        return torch.cat((virtual, real, nothing), dim=1)[row, index]

    def _index(self, rows: int, tokens: int, device: torch.device) -> Tensor:
        """Return for each position of the result its index in [virtual; real; nothing], (B, S)."""
        position = torch.arange(self.n + tokens, device=device)[None]
        counts = self._counts_on(device)
        if self.causal:
            leads = 0 if self.leads is None else self.leads.to(device)
            which, token = position - (leads + self.n - counts), position - self.n
            is_real = token >= leads
        else:
            which, token = position, position - counts
            is_real = (token >= 0) & (token < tokens)
        is_virtual = (which >= 0) & (which < counts)
        nothing = torch.full_like(which.expand(rows, -1), self.n + tokens)
        return torch.where(is_virtual, which, torch.where(is_real, self.n + token, nothing))

    def _counts_on(self, device: torch.device) -> Tensor | int:
        """Return `counts` on a device: a part of the model may be on another one than its inputs."""
        return self.counts if isinstance(self.counts, int) else self.counts.to(device)

    def mask(self, real: Tensor) -> Tensor:
        """Widen a mask (B, T) to (B, S); virtual tokens are seen."""
        return self.merge(real.new_ones(real.shape[0], self.n), real)

    def text_of(self, states: Tensor) -> Tensor:
        """Return the states (B, T, ...) at the text's positions of (B, S, ...)."""
        if self.causal or self.even:
            return states[:, self.n :]
        tokens = states.shape[1] - self.n
        index = self._counts_on(states.device) + torch.arange(tokens, device=states.device)[None]
        return states.gather(1, index.view(*index.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:]))


@cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def inputs_of(stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, however they were passed."""
    return {**dict(zip(_parameters(type(stack).forward), args, strict=False)), **kwargs}


def accepts(stack: nn.Module, name: str) -> bool:
    """Return True if the forward of a stack has a parameter of this name."""
    return name in _parameters(type(stack).forward)


def cached_tokens(inputs: Mapping[str, Any]) -> int:
    """Return the number of positions in the cache of a call; 0 without a cache."""
    past = inputs.get("past_key_values")
    return 0 if past is None else int(past.get_seq_length())


def size_of(inputs: Mapping[str, Any]) -> tuple[int, int, torch.device]:
    """Return B, T and device of a call.

    Raises:
        ModelError: it has neither ids nor embeddings.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tensor = ids if ids is not None else embeds
    if tensor is None:
        raise ModelError("the model was called with neither input_ids nor inputs_embeds")
    return tensor.shape[0], tensor.shape[1], tensor.device


def own_positions(stack: nn.Module, inputs: Mapping[str, Any], past: int) -> Tensor:
    """Return the position ids that the stack would use if nobody changed the call.

    Args:
        stack: The stack.
        inputs: The arguments of its call.
        past: Tokens of the text, virtual ones not counted, in the cache.

    Returns:
        (B, T), or (1, T) if all rows have the same.
    """
    if (given := inputs.get("position_ids")) is not None:
        return cast(Tensor, given)
    _, tokens, device = size_of(inputs)
    if numbers_from_ids(stack):
        embeddings: Any = stack.embeddings
        padding = embeddings.padding_idx
        if (ids := inputs.get("input_ids")) is not None:
            return cast(Tensor, embeddings.create_position_ids_from_input_ids(ids, padding, past))
        return torch.arange(padding + 1, padding + 1 + tokens, device=device).unsqueeze(0)
    mask = inputs.get("attention_mask")
    if _counts_by_mask(stack) and mask is not None:
        counted: Tensor = mask.long().cumsum(dim=1) * mask.long()
        return (counted - 1)[:, -tokens:]
    return torch.arange(past, past + tokens, device=device).unsqueeze(0)


def numbers_from_ids(stack: nn.Module) -> bool:
    """Return True for RoBERTa and its relatives, which count positions from the padding id on and leave padding out."""
    return hasattr(getattr(stack, "embeddings", None), "create_position_ids_from_input_ids")


def _counts_by_mask(stack: nn.Module) -> bool:
    """Return True for OPT, which counts positions by the mask, so that padding at the left has none."""
    return type(getattr(stack, "embed_positions", None)).__name__ == "OPTLearnedPositionalEmbedding"


def first_position(stack: nn.Module) -> int:
    """Return the position id of a row's first token."""
    embeddings: Any = stack.embeddings if numbers_from_ids(stack) else None
    return 0 if embeddings is None else int(embeddings.padding_idx) + 1


def positions_taken(model: PreTrainedModel) -> int:
    """Return the number of positions taken by the virtual tokens of the active adapters before the text."""
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None:
        return 0
    causal = is_causal(model.config)
    return sum(model_adapters.adapters[name].method.positions(causal) for name in model_adapters.selection.used())


def check_positions(stack: nn.Module, virtual: int, text: int) -> None:
    """Check that rows, virtual tokens included, fit into the positions of a model with a position table.

    Raises:
        ModelError: they do not; the message gives the number of tokens that do.
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


def drop_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove hooks of these kinds from a module."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for identity in [identity for identity, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[identity]
            with_kwargs.pop(identity, None)
