"""Prefixes in the attention function: learned keys and values in front of those that a model computes.

Transformers' models call their attention by a name in the configuration. An adapted model's name is one of ours; our
function looks for prefixes in the calling module's slots, puts them in front of key and value, widens mask and position
bias by as many columns, and calls the implementation that the model had. Without an active prefix it only passes the
call on, so that outputs are the base's bits. Nothing goes into the cache: a prefix is put in front at every call, after
the cache was read.

Legend: B rows, H heads, G key/value heads, D head width, Q queries, K keys, n virtual tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from graftwerk.errors import ConflictError, UnsupportedError
from graftwerk.kernels import flags
from graftwerk.kernels.versioned_cache import VersionedCache
from graftwerk.methods.base import Method
from graftwerk.methods.placement import module_device
from graftwerk.methods.prefix_tuning import Prefix, PrefixMLP, PrefixModule, PrefixVectors, ProjectedPrefix
from graftwerk.modeling.adapter_slots import AdapterSlots, ModelAdapters, slots_of
from graftwerk.modeling.architectures import Architecture, AttentionLayer, LayerStack
from graftwerk.modeling.prefix_mask import PrefixMasks
from graftwerk.modeling.virtual_positions import (
    cached_tokens,
    check_positions,
    counts_of,
    drop_hooks,
    gathered,
    inputs_of,
    lengths,
    own_positions,
    per_row,
    size_of,
    users,
)

OURS = "graftwerk_"
_KeysAndValues = tuple[Tensor, Tensor]
_recorder: ContextVar[dict[int, _KeysAndValues] | None] = ContextVar("graftwerk_recorder", default=None)
"""While keys and values are recorded: those of the last call by id(attention module)."""


# -- the attention function -----------------------------------------------------------------------------------------


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
    """
    original = sdpa_attention_forward if implementation == "sdpa" else _eager_of(module)
    recorder = None if torch.compiler.is_compiling() else _recorder.get()
    if recorder is not None:
        recorder[id(module)] = (key, value)
    slots = slots_of(module)
    prefix = None if slots is None else _active_prefix_kv(slots, key)
    if slots is not None and prefix is not None:
        prefix_key, prefix_value, seen = prefix
        n = prefix_key.shape[2]
        attention_mask = _masks_of(slots).widened(
            module, query, key, attention_mask, seen, n, kwargs, sdpa=implementation == "sdpa"
        )
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n, 0))
        key = torch.cat((prefix_key, key), dim=2)
        value = torch.cat((prefix_value, value), dim=2)
    return original(module, query, key, value, attention_mask, **kwargs)


def _masks_of(slots: AdapterSlots) -> PrefixMasks:
    if torch.compiler.is_compiling():
        return PrefixMasks()  # a graph makes each mask once by itself, and has no place to look one up
    return slots.selection.cached(PrefixMasks, lambda kind: kind())


def _active_prefix_kv(slots: AdapterSlots, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return keys and values (B, G, n, D), and the columns (B, n) that a row sees if rows differ; None if no prefix."""
    rows, _ = users(slots, PrefixModule, key.shape[0])
    n = max(lengths(rows))
    if n == 0:
        return None
    size, heads, _, width = key.shape
    if len(rows) == 1:
        pairs = [module.vectors() for module in rows[0]]
        one_key, one_value = (
            torch.cat([pair[side] for pair in pairs]).to(key.dtype).view(1, n, heads, width).transpose(1, 2)
            for side in (0, 1)
        )
        return one_key.expand(size, -1, -1, -1), one_value.expand(size, -1, -1, -1), None
    arguments = (slots, size, key.device, key.dtype, flags.enabled("rows"))
    keys, values, seen = slots.selection.cached(arguments, lambda _: _PerRowPrefix(*arguments)).keys_values()
    shape = (size, n, heads, width)
    return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2), seen


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
        rows, repeats = users(slots, PrefixModule, size)
        counts = lengths(rows)
        self.distinct, self.index = gathered(rows, repeats, device)
        self.seen: Tensor | None = None
        if min(counts) < max(counts):  # one tensor for all attentions, so that they share the mask made from it
            self.seen = slots.selection.cached((*counts, repeats, device), lambda _: _columns(counts, repeats, device))
        sources = list(dict.fromkeys(tensor for module in self.distinct for tensor in module.source_tensors()))
        self.cache: VersionedCache[_KeysAndValues] = VersionedCache(sources, sources)

    def keys_values(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values (B, n, G·D), and the columns (B, n) that each row sees or None if it sees all."""
        keys, values = self.cache.get(self._build) if self.use_cache else self._build()
        return keys, values, self.seen

    def _build(self) -> _KeysAndValues:
        pairs = [module.vectors() for module in self.distinct]
        keys, values = (torch.cat([pair[side] for pair in pairs]).to(self.dtype)[self.index] for side in (0, 1))
        return keys, values


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


_MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
for _name, _mask in _MASKS.items():
    AttentionInterface.register(OURS + _name, partial(prefix_attention_forward, _name))
    AttentionMaskInterface.register(OURS + _name, _mask)


# -- which implementation a model uses ------------------------------------------------------------------------------


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return every configuration object in a model; the two halves of T5 have copies of their own."""
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    return list(found.values())


def _check_implementation(model: PreTrainedModel) -> None:
    for config in configs_of(model):
        name = (config._attn_implementation or "").removeprefix(OURS)
        if name not in ("", *_MASKS):
            raise UnsupportedError(
                f"a prefix cannot go into the attention implementation `{name}`",
                hint='load the model with attn_implementation="sdpa" or "eager"',
            )
        if name == "eager" and getattr(config, "reorder_and_upcast_attn", False):
            raise UnsupportedError(
                "with `reorder_and_upcast_attn` GPT-2's eager attention does not go through transformers' interface",
                hint='load the model with attn_implementation="sdpa"',
            )


def _install_attention(model: nn.Module) -> None:
    for config in configs_of(model):
        if config._attn_implementation in _MASKS:
            config._attn_implementation_internal = OURS + config._attn_implementation


def _restore_attention(model: nn.Module) -> None:
    for config in configs_of(model):
        if (config._attn_implementation or "").startswith(OURS):
            config._attn_implementation_internal = config._attn_implementation.removeprefix(OURS)


# -- hooks on the stacks --------------------------------------------------------------------------------------------


class _ShiftPositionsHook:
    """Forward pre-hook of a stack that shifts the text's positions behind the prefix in decoder-only models.

    An object and not a closure, so that a deep copy of the model has hooks that refer to the copy.

    Args:
        attentions: Self-attention modules of the stack; every prefix has a module in at least one of them.
        shifts: True if the text's positions start after the prefix.
    """

    def __init__(self, attentions: Sequence[nn.Module], shifts: bool) -> None:
        self.attentions, self.shifts = tuple(attentions), shifts

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        every = [slots_of(attention) for attention in self.attentions]
        all_slots = [slots for slots in every if slots is not None]
        if not all_slots:
            return None
        _masks_of(all_slots[0]).begin_pass()
        inputs = inputs_of(stack, args, kwargs)
        size, tokens, device = size_of(inputs)
        counts, repeats = _virtual_tokens(all_slots, size)
        if max(counts) == 0:
            return None
        implementation = getattr(stack.config, "_attn_implementation", None)
        if not str(implementation).startswith(OURS):
            raise ConflictError(
                f"the attention implementation was changed to `{implementation}` while a prefix is active",
                hint="choose the implementation before attaching",
            )
        if not self.shifts:
            return None
        past = cached_tokens(inputs)
        check_positions(stack, max(counts), past + tokens)
        inputs["position_ids"] = own_positions(stack, inputs, past) + counts_of(counts, repeats, device)
        return (), inputs


def _virtual_tokens(all_slots: Sequence[AdapterSlots], size: int) -> tuple[list[int], int]:
    """Return the number of virtual tokens of each named row, and of batch rows that it stands for.

    A prefix that is in some layers only moves the text's positions all the same: they are those of the whole stack.
    """

    def tokens(name: str | None) -> int:
        modules = [slots.get(name) for slots in all_slots]
        return next((module.n for module in modules if isinstance(module, PrefixModule)), 0)

    selection = all_slots[0].selection
    if selection.rows is None:
        return [sum(tokens(name) for name in selection.names if name not in selection.merged)], size
    return [tokens(name) for name in selection.rows], selection.repeats(size)


# -- building, installing, removing ---------------------------------------------------------------------------------


def build_modules(model: PreTrainedModel, method: Method, architecture: Architecture) -> dict[str, nn.Module]:
    """Build the modules of a new prefix: one for each attention, and with a network one for each stack.

    Returns:
        By host path.

    Raises:
        UnsupportedError: the architecture is not in the table, or its attention cannot take a prefix.
    """
    assert isinstance(method, Prefix)
    if not architecture.attentions:
        raise UnsupportedError(
            f"prefix tuning does not know where the attention of `{architecture.model_type}` is",
            hint="use lora, bottleneck or prompt tuning on this model",
        )
    _check_implementation(model)
    chosen = method.filter_layers(architecture.attentions)
    starts = _starting_values(model, method, chosen)
    if not method.prefix_projection:
        return {attention.path: PrefixVectors(*starts[attention.path]) for attention in chosen}
    modules: dict[str, nn.Module] = {}
    mlps = {}
    for stack in stacks_of(architecture, chosen):
        hidden = method.encoder_hidden_size or architecture.stacks[0].width
        mlp = PrefixMLP(method.num_virtual_tokens, stack.width, hidden)
        modules[stack.path] = mlps[stack.kind] = mlp
    for attention in chosen:
        modules[attention.path] = ProjectedPrefix(mlps[attention.stack], *starts[attention.path])
    return modules


def stacks_of(architecture: Architecture, attentions: Sequence[AttentionLayer]) -> list[LayerStack]:
    """Return the stacks that some of these attentions are in."""
    return [stack for stack in architecture.stacks if any(attention.stack == stack.kind for attention in attentions)]


def install_hooks(model: PreTrainedModel, model_adapters: ModelAdapters) -> None:
    """Make a model's attention look for prefixes. A second call changes nothing."""
    from graftwerk.modeling.architectures import read_architecture

    architecture = read_architecture(model)
    _install_attention(model)
    for stack in architecture.stacks:
        attentions = [
            model.get_submodule(attention.path)
            for attention in architecture.attentions
            if attention.stack == stack.kind and not attention.cross
        ]
        host = model.get_submodule(stack.path)
        if attentions and not any(isinstance(hook, _ShiftPositionsHook) for hook in host._forward_pre_hooks.values()):
            host.register_forward_pre_hook(_ShiftPositionsHook(attentions, stack.kind == "causal"), with_kwargs=True)


def remove_hooks(model: PreTrainedModel, model_adapters: ModelAdapters) -> None:
    """Restore the attention of a model: configuration and hooks are those from before."""
    _restore_attention(model)
    for module in model.modules():
        drop_hooks(module, (_ShiftPositionsHook,))


# -- where a prefix starts ------------------------------------------------------------------------------------------


def _starting_values(
    model: PreTrainedModel, method: Prefix, attentions: Sequence[AttentionLayer]
) -> dict[str, _KeysAndValues]:
    """Return keys and values (n, G·D) of each attention: small random ones, or the frozen model's for a text."""
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


def _random_kv(method: Prefix, attention: AttentionLayer) -> _KeysAndValues:
    shape = (method.num_virtual_tokens, attention.kv_heads * attention.head_dim)
    return torch.randn(shape) * method.init_std, torch.randn(shape) * method.init_std


def _flatten_heads(pair: _KeysAndValues, attention: AttentionLayer) -> _KeysAndValues:
    """Reshape (1, G, n, D) to (n, G·D)."""
    width = attention.kv_heads * attention.head_dim
    key, value = (tensor[0].transpose(0, 1).reshape(-1, width).float() for tensor in pair)
    return key, value


@torch.no_grad()
def _record_kv(model: PreTrainedModel, ids: Tensor) -> dict[int, _KeysAndValues]:
    """Run the bare base over ids (1, n), in evaluation mode, and return keys and values by id(attention module)."""
    model_adapters = ModelAdapters.of(model)
    recorded: dict[int, _KeysAndValues] = {}
    was_ours = any((config._attn_implementation or "").startswith(OURS) for config in configs_of(model))
    modes = {module: module.training for module in model.modules()}
    extra: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    token = _recorder.set(recorded)
    try:
        _install_attention(model)
        model.eval()
        with contextlib.nullcontext() if model_adapters is None else model_adapters.bare():
            model.base_model(input_ids=ids, **extra)
    finally:
        _recorder.reset(token)
        for module, training in modes.items():
            module.training = training
        if not was_ours:
            _restore_attention(model)
    return recorded
