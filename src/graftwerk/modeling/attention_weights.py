"""Attention weights of a pass, layer by layer: only one slice of one layer's weights is in memory at a time.

Fast attention kernels never form the weights, so that the pass runs in the eager attention of the model's own file. It
is called for a few queries at a time, which changes nothing: each query's weights are its own.

Legend: B rows, H heads, Q queries, K keys, n virtual tokens of a prefix, S = n + K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from graftwerk.modeling.prefix_attention import OURS, configs_of, prefix_attention_forward

MOST_BYTES = 2**28
"""Bytes that the weights of a slice may take: scores, their softmax, and a copy in float32."""
_NAME = OURS + "recorded"
Taker = Callable[[nn.Module, int, Tensor], None]
_taker: ContextVar[Taker] = ContextVar("graftwerk_attention_taker")


@contextmanager
def recorded_attention(model: nn.Module, take: Taker) -> Iterator[None]:
    """Run the model's attention eagerly inside the block, and hand the weights on.

    Args:
        model: A model with or without adapters; its attention goes through transformers' interface.
        take: Called with an attention module, the number of its first query, and the weights of the next few queries,
            (B, H, q, S), the columns of a prefix first. A first query 0 begins a new call of the module.
    """
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    token = _taker.set(take)
    try:
        for config, name in before:
            if name is not None:
                config._attn_implementation_internal = _NAME
        yield
    finally:
        _taker.reset(token)
        for config, name in before:
            config._attn_implementation_internal = name


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attend as `prefix_attention_forward` does, a few queries at a time."""
    rows, heads, queries, _ = query.shape
    step = max(1, MOST_BYTES // (12 * rows * heads * max(key.shape[2], 1)))
    outputs, bias = [], kwargs.get("position_bias")
    for start in range(0, queries, step):
        part = slice(start, start + step)
        own = kwargs if bias is None else {**kwargs, "position_bias": _rows(bias, part, queries)}
        mask = None if attention_mask is None else _rows(attention_mask, part, queries)
        output, weights = prefix_attention_forward("eager", module, query[:, :, part], key, value, mask, **own)
        _taker.get()(module, start, weights.detach())
        outputs.append(output)  # (B, q, H, D)
    return torch.cat(outputs, dim=1), None


def _rows(tensor: Tensor, part: slice, queries: int) -> Tensor:
    """Return the rows of some queries of a mask or a bias, (B, H, Q, K), or (B, H, 1, K) for all queries alike."""
    return tensor[:, :, part] if tensor.shape[2] == queries else tensor


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, eager_mask)
