"""The keys and values that a prefix starts from: small random ones, or those that the frozen model computes for a text.

Legend: G key/value heads, D head width, n virtual tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from graftwerk.errors import UnsupportedError
from graftwerk.methods.placement import module_device
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.modeling.adapter_slots import ModelAdapters
from graftwerk.modeling.architectures import AttentionLayer
from graftwerk.modeling.module_index import modes_restored
from graftwerk.modeling.prefix_attention import MASKS, OURS, configs_of, prefix_attention_forward

KeysAndValues = tuple[Tensor, Tensor]


def starting_values(
    model: PreTrainedModel, method: Prefix, attentions: Sequence[AttentionLayer]
) -> dict[str, KeysAndValues]:
    """Return the initial keys and values of each attention.

    Returns:
        Keys and values, (n, G·D) each, by path of the attention.

    Raises:
        UnsupportedError: An attention does not go through transformers' interface.
    """
    table = model.get_input_embeddings().weight
    ids = method.start_ids(table.shape[0])
    if ids is None:
        return {attention.path: _random_kv(method, attention) for attention in attentions}
    recorded = _record_kv(model, torch.tensor(ids, device=module_device(model.get_input_embeddings()))[None])
    hosts = {attention: model.get_submodule(attention.path) for attention in attentions}
    if unrecorded := [attention.path for attention, host in hosts.items() if id(host) not in recorded]:
        raise UnsupportedError(
            f"the attention of {type(model).__name__} does not go through transformers' attention interface",
            where=unrecorded[0],
            hint="use lora, bottleneck or prompt tuning on this model",
        )
    return {attention.path: _flatten_heads(recorded[id(host)], attention) for attention, host in hosts.items()}


def _random_kv(method: Prefix, attention: AttentionLayer) -> KeysAndValues:
    shape = (method.num_virtual_tokens, attention.kv_heads * attention.head_dim)
    return torch.randn(shape) * method.init_std, torch.randn(shape) * method.init_std


def _flatten_heads(pair: KeysAndValues, attention: AttentionLayer) -> KeysAndValues:
    """Reshape (1, G, n, D) to (n, G·D)."""
    width = attention.kv_heads * attention.head_dim
    key, value = (tensor[0].transpose(0, 1).reshape(-1, width).float() for tensor in pair)
    return key, value


# -- recording what the frozen model computes -----------------------------------------------------------------------

_RECORDING = OURS + "recording_"
_recorded: ContextVar[dict[int, KeysAndValues]] = ContextVar("graftwerk_recorded_keys_and_values")
"""While keys and values are recorded: those of the last call by id(attention module)."""


@torch.no_grad()
def _record_kv(model: PreTrainedModel, ids: Tensor) -> dict[int, KeysAndValues]:
    """Run the bare base over ids (1, n), in evaluation mode, and return keys and values by id(attention module)."""
    model_adapters = ModelAdapters.of(model)
    recorded: dict[int, KeysAndValues] = {}
    implementations = [(config, config._attn_implementation) for config in configs_of(model)]
    extra: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    token = _recorded.set(recorded)
    try:
        for config, name in implementations:
            if (plain := (name or "").removeprefix(OURS)) in MASKS:
                config._attn_implementation_internal = _RECORDING + plain
        with modes_restored(model), contextlib.nullcontext() if model_adapters is None else model_adapters.bare():
            model.eval()
            model.base_model(input_ids=ids, **extra)
    finally:
        _recorded.reset(token)
        for config, name in implementations:
            config._attn_implementation_internal = name
    return recorded


def _recording_forward(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Note an attention's keys and values, (1, G, n, D) each, and attend as without recording."""
    _recorded.get()[id(module)] = (key, value)
    return prefix_attention_forward(implementation, module, query, key, value, *args, **kwargs)


for _name, _mask in MASKS.items():
    AttentionInterface.register(_RECORDING + _name, partial(_recording_forward, _name))
    AttentionMaskInterface.register(_RECORDING + _name, _mask)
