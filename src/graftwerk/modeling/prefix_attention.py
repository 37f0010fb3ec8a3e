"""The attention function of prefix tuning: attention(Q, [P_k; K], [P_v; V]), in any model of transformers.

Transformers' models call their attention by a name in the configuration. An adapted model's name is one of ours; our
function looks for prefixes in the calling module's slots, puts them in front of key and value, widens mask and position
bias by as many columns, and calls the implementation that the model had. Without an active prefix it only passes the
call on, so that outputs are the base's bits. Nothing goes into the cache: a prefix is put in front at every call, after
the cache was read.

Legend: B rows, H heads, G key/value heads, D head width, Q queries, K keys, n virtual tokens, S = n + K.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from graftwerk.errors import UnsupportedError
from graftwerk.kernels import flags
from graftwerk.kernels.versioned_cache import VersionedCache
from graftwerk.methods.prefix_tuning import PrefixModule
from graftwerk.modeling.adapter_slots import AdapterSlots, slots_of
from graftwerk.modeling.prefix_mask import AttentionCall, PrefixMasks
from graftwerk.modeling.virtual_positions import VirtualRows, per_row


def prefix_attention_forward(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attend with the active prefix; called by transformers.

    Args:
        implementation: Name of the implementation that the model had.
        module: The attention.
        query: (B, H, Q, D).
        key: (B, G, K, D).
        value: (B, G, K, D).
        attention_mask: (B or 1, H or 1, Q, K), or None. Booleans are True where a key is seen; numbers are added to
            the scores.
        **kwargs: As transformers passes them.

    Returns:
        What the implementation returns: outputs (B, Q, H, D), and weights (B, H, Q, S) or None.
    """
    attention = sdpa_attention_forward if implementation == "sdpa" else _eager_of(module)
    prefix = _active_prefix(module, key)
    if prefix is not None:
        n = prefix.key.shape[2]
        call = AttentionCall(module, query, key, attention_mask, kwargs, sdpa=implementation == "sdpa")
        attention_mask = prefix.masks.widened(call, n, prefix.seen)  # (B or 1, H or 1, Q, S)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n, 0))  # (B or 1, H, Q, S)
        key = torch.cat((prefix.key, key), dim=2)  # (B, G, S, D)
        value = torch.cat((prefix.value, value), dim=2)  # (B, G, S, D)
    return attention(module, query, key, value, attention_mask, **kwargs)


class _ActivePrefix(NamedTuple):
    """Keys and values that go in front of those of one call.

    Attributes:
        key: (B, G, n, D).
        value: (B, G, n, D).
        seen: (B, n), the columns that each row sees, or None if it sees all of them.
        masks: Masks of this pass, shared by all attentions of the model.
    """

    key: Tensor
    value: Tensor
    seen: Tensor | None
    masks: PrefixMasks


def _active_prefix(module: nn.Module, key: Tensor) -> _ActivePrefix | None:
    """Return the prefix of an attention for a batch, several active ones joined; None if no row has one.

    Args:
        module: The attention.
        key: Its own keys, (B, G, K, D).
    """
    if (slots := slots_of(module)) is None:
        return None
    size, heads, _, width = key.shape
    rows = VirtualRows(slots, PrefixModule, size)
    n = rows.n
    if n == 0:
        return None
    if rows.differ:
        arguments = (slots, size, key.device, key.dtype, flags.enabled("rows"))
        keys, values, seen = slots.selection.cached(arguments, lambda _: _PerRowPrefix(*arguments)).keys_values()
    else:
        (keys, values), seen = _joined(rows.modules[0], key.dtype), None
    own_key, own_value = (  # (B or 1, n, G·D) -> (B, G, n, D)
        tensor.view(-1, n, heads, width).transpose(1, 2).expand(size, -1, -1, -1) for tensor in (keys, values)
    )
    return _ActivePrefix(own_key, own_value, seen, masks_of(slots))


def _joined(prefixes: Sequence[PrefixModule], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of prefixes, one prefix after the other, (sum of n, G·D) each."""
    pairs = [prefix.vectors() for prefix in prefixes]
    keys, values = (torch.cat([pair[side] for pair in pairs]).to(dtype) for side in (0, 1))
    return keys, values


def masks_of(slots: AdapterSlots) -> PrefixMasks:
    """Return the widened masks of the pass that an attention with these slots is called in."""
    if torch.compiler.is_compiling():
        return PrefixMasks()  # a graph makes each mask once by itself, and has no place to look one up
    return slots.selection.cached(PrefixMasks, lambda kind: kind())


class _PerRowPrefix:
    """The prefixes at one attention when rows have different ones.

    Keys and values are built once for an assignment of adapters to rows, and again if a parameter has changed; in
    training at every call.

    Args:
        slots: Slots of the attention.
        size: Rows of the batch, B.
        device, dtype: Those of the keys and values.
        cache: True to reuse keys and values until a parameter changes.
    """

    def __init__(self, slots: AdapterSlots, size: int, device: torch.device, dtype: torch.dtype, cache: bool) -> None:
        self.dtype, self.use_cache = dtype, cache
        rows = VirtualRows(slots, PrefixModule, size)
        counts, repeats = rows.counts, rows.repeats
        self.distinct, self.index = rows.gather(device)
        self.seen: Tensor | None = None
        if min(counts) < rows.n:  # one tensor for all attentions, so that they share the mask made from it
            self.seen = slots.selection.cached((*counts, repeats, device), lambda _: _columns(counts, repeats, device))
        sources = list(dict.fromkeys(tensor for module in self.distinct for tensor in module.source_tensors()))
        self.cache: VersionedCache[tuple[Tensor, Tensor]] = VersionedCache(sources, sources)

    def keys_values(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values (B, n, G·D), and the columns (B, n) that each row sees or None if it sees all."""
        keys, values = self.cache.get(self._build) if self.use_cache else self._build()
        return keys, values, self.seen

    def _build(self) -> tuple[Tensor, Tensor]:
        keys, values = _joined(self.distinct, self.dtype)
        return keys[self.index], values[self.index]


def _columns(counts: Sequence[int], repeats: int, device: torch.device) -> Tensor:
    """Return the columns of a prefix that each row sees, (B, n) bool."""
    return torch.arange(max(counts), device=device)[None] < per_row(counts, repeats, device)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention of a module: each modeling file of transformers has its own."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise UnsupportedError(
        f"{type(module).__name__} has no eager attention that a prefix could go into",
        hint='load the model with attn_implementation="sdpa"',
    )


# -- the implementations that a model can name in its configuration -------------------------------------------------

OURS = "graftwerk_"
"""Begins the name of each of ours; the name of the implementation that the model had follows."""
MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
"""The implementations that a prefix can go into, each with transformers' function for its mask."""
for _name, _mask in MASKS.items():
    AttentionInterface.register(OURS + _name, partial(prefix_attention_forward, _name))
    AttentionMaskInterface.register(OURS + _name, _mask)


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return every configuration object in a model; the two halves of T5 have copies of their own."""
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    return list(found.values())
