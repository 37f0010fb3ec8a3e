"""The attention mask of a pass with a prefix in front: made once for all layers, in the form that fast kernels take.

Legend: B rows, H heads, Q queries, K keys, n virtual tokens, S = n + K.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakIdKeyDictionary

ALIGNED = 8
"""CUDA's attention kernels copy a mask, in every layer, whose rows do not begin at multiples of so many elements."""


class AttentionCall(NamedTuple):
    """One call of an attention, as transformers makes it.

    Attributes:
        module: The attention.
        query: (B, H, Q, D).
        key: (B, G, K, D), without the prefix.
        mask: (B or 1, H or 1, Q, K), or None.
        options: Further arguments of the attention function, by name.
        sdpa: True for torch's scaled dot product attention, which without a mask may be causal by itself.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    sdpa: bool


class PrefixMasks:
    """The widened masks of a pass, by the masks that they were made from; they live no longer than those."""

    def __init__(self) -> None:
        self._made: Any = None  # made when it is needed: a graph of torch.compile cannot
        self._causal: tuple[Hashable, Tensor] | None = None

    def begin_pass(self) -> None:
        """Forget the masks of earlier passes, whose values may have changed."""
        self._made = None

    def widened(self, call: AttentionCall, n: int, seen: Tensor | None) -> Tensor | None:
        """Return the mask that an attention needs with n keys more in front.

        Args:
            call: The attention as it is called without them.
            n: Virtual tokens.
            seen: (B, n), the columns that each row sees, or None if it sees all of them.

        Returns:
            (B or 1, H or 1, Q, S), or None if everything is seen.
        """
        query, key, mask = call.query, call.key, call.mask
        causal = mask is None and call.sdpa and _is_causal(call)
        if mask is None and seen is None and not causal:
            return None
        tokens, fast = (query.shape[2], key.shape[2]), call.sdpa and has_fast_kernels(query)
        if causal and fast and seen is None and tokens[0] == tokens[1] and call.options.get("position_bias") is None:
            return causal_lower_right(tokens[0], n + tokens[1])  # no tensor at all: flash attention knows this mask
        dtype = _compute_dtype(query)

        def make() -> Tensor:
            with torch.inference_mode(False):  # backward may save it
                own = mask
                if own is None:
                    own = torch.ones(1, 1, *tokens, dtype=torch.bool, device=key.device)
                    own = own.tril() if causal else own
                wide = _with_columns(own, seen, n)
                return aligned(wide, dtype) if fast else wide

        if torch.compiler.is_compiling():
            return make()
        facts: Hashable = (n, id(seen), fast, dtype if fast else None)
        return self._once(mask, facts, (causal, tokens, key.device), make)

    def _once(self, mask: Tensor | None, facts: Hashable, shape: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if mask is None:  # the same in every pass of these sizes
            if self._causal is None or self._causal[0] != (facts, shape):
                self._causal = ((facts, shape), make())
            return self._causal[1]
        if self._made is None:
            self._made = WeakIdKeyDictionary()
        made: dict[Hashable, Tensor] = self._made.setdefault(mask, {})
        if facts not in made:
            made[facts] = make()
        return made[facts]


def has_fast_kernels(query: Tensor) -> bool:
    """Return True if attention runs in kernels that mind the form of a mask; query (B, H, Q, D)."""
    return query.is_cuda


def aligned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add to the scores, its rows at multiples of `ALIGNED` elements.

    Args:
        mask: (B, H, Q, S), or 1 in place of B or H; booleans are True where a key is seen.
        dtype: dtype of the scores.

    Returns:
        The mask, (B, H, Q, S) as before, a view of a wider tensor.
    """
    width = mask.shape[-1]
    buffer = torch.zeros(*mask.shape[:-1], -(-width // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)
    added = buffer[..., :width]
    if mask.dtype == torch.bool:
        return added.masked_fill_(~mask, -torch.inf)
    return added.copy_(mask)


def _is_causal(call: AttentionCall) -> bool:
    """Return True if sdpa, given no mask, would let each query see only the keys up to its own."""
    causal = call.options.get("is_causal")
    return call.query.shape[2] > 1 and bool(getattr(call.module, "is_causal", True) if causal is None else causal)


def _compute_dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _with_columns(mask: Tensor, seen: Tensor | None, n: int) -> Tensor:
    """Return a mask with n columns in front; ``seen`` (B, n) marks those a row sees, None all of them."""
    columns = torch.ones(1, n, dtype=torch.bool, device=mask.device) if seen is None else seen
    columns = columns[:, None, None, :]
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        columns = torch.zeros(columns.shape, dtype=mask.dtype, device=mask.device).masked_fill(~columns, hidden)
    size = max(mask.shape[0], columns.shape[0])
    columns = columns.expand(size, mask.shape[1], mask.shape[2], n)
    return torch.cat((columns, mask.expand(size, -1, -1, -1)), dim=-1)
