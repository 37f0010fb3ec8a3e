"""Prompts at the input embeddings of a stack: the stack reads n more tokens, and the outputs do not show it.

A forward pre-hook turns token ids into embeddings, puts the virtual ones in front and makes mask, position ids and
token types as long; a forward hook takes the virtual positions out of the result. So labels, logits, pooling by token
ids and generation work as for the bare base. Two kinds of model do see the virtual positions, as in PEFT: a decoder
attends to those of its encoder, and a classifier that pools the first position pools the first virtual token.

In decoder-only models the virtual tokens enter the cache with the first call; later calls only make mask and positions
fit. They stand directly before a row's text, behind any padding at the left, so that distances are those of the row
alone. If rows differ in n, encoders fill up at the right end and decoders at the left.

A sliding window slides over virtual tokens as over others: tokens further back are seen through the layers between.

Legend: B rows, T tokens of the text, n virtual tokens of the row with most, S = n + T, d input width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError, ConflictError, UnsupportedError
from graftwerk.kernels.memory_efficient import own_base
from graftwerk.methods.base import Method
from graftwerk.methods.prompt_tuning import Prompt, PromptModule
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.virtual_positions import (
    VirtualLayout,
    VirtualRows,
    accepts,
    cached_tokens,
    check_positions,
    drop_hooks,
    first_position,
    inputs_of,
    numbers_from_ids,
    own_positions,
    size_of,
)

_POOLS_FIRST = re.compile(r"For(SequenceClassification|MultipleChoice)$")


# -- hooks ----------------------------------------------------------------------------------------------------------


class _Insert:
    """Forward pre-hook of a stack: inserts the virtual tokens; ``_Trim`` reads the layout of the last call.

    Hooks are objects and not closures, so that a deep copy of the model has hooks that know the copy.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.inserted: VirtualLayout | None = None

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inserted = None
        slots = slots_of(stack)
        if slots is None:
            return None
        inputs = inputs_of(stack, args, kwargs)
        size, tokens, device = size_of(inputs)
        rows = VirtualRows(slots, PromptModule, size)
        n = rows.n
        if n == 0:
            return None
        cached = cached_tokens(inputs)
        past = max(cached - n, 0)
        mask = _checked(inputs, cached, past, n, self.causal)
        check_positions(stack, n, past + tokens)
        layout = rows.layout(_leads(mask) if self.causal else None, self.causal, device)
        if mask is None and not layout.even:
            mask = torch.ones(size, past + tokens, dtype=torch.long, device=device)
        if cached:
            inputs["position_ids"] = own_positions(stack, inputs, past) + layout.counts
            inputs["attention_mask"] = None if mask is None else layout.mask(mask)
            return (), inputs
        self._insert(stack, inputs, layout, rows, mask)
        self.inserted = layout
        return (), inputs

    def _insert(
        self,
        stack: nn.Module,
        inputs: dict[str, Any],
        layout: VirtualLayout,
        rows: VirtualRows[PromptModule],
        mask: Tensor | None,
    ) -> None:
        """Put the virtual tokens into the arguments of a call, ``mask`` (B, T) or (B, S) among them."""
        size, tokens, device = size_of(inputs)
        if self.causal or inputs.get("position_ids") is not None or numbers_from_ids(stack):
            first = first_position(stack)
            virtual = torch.arange(first, first + layout.n, device=device).expand(size, -1)
            real = own_positions(stack, inputs, 0).expand(size, -1) + layout.counts
            if accepts(stack, "position_ids"):
                inputs["position_ids"] = layout.merge(virtual, real)
        if (types := inputs.get("token_type_ids")) is not None and accepts(stack, "token_type_ids"):
            if self.causal:
                raise UnsupportedError(
                    "virtual tokens of a decoder-only model have no token type",
                    hint="call the model without token_type_ids",
                )
            inputs["token_type_ids"] = layout.merge(types.new_zeros(size, layout.n), types)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = stack.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]
        inputs["inputs_embeds"] = layout.merge(_embeddings(rows, embeds), embeds)
        inputs["input_ids"] = None
        if mask is not None:
            inputs["attention_mask"] = mask if mask.shape[1] == layout.n + tokens else layout.mask(mask)


class _Trim:
    """Forward hook of a stack: removes the virtual positions from the result."""

    def __init__(self, insert: _Insert) -> None:
        self.insert = insert

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layout, self.insert.inserted = self.insert.inserted, None
        if layout is None:
            return None
        length = kwargs["inputs_embeds"].shape[1]

        def trimmed(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length:
                return layout.text_of(value)
            if type(value) in (tuple, list):
                return type(value)(trimmed(part) for part in value)
            return value

        if isinstance(output, tuple):
            return trimmed(output)
        for key, value in list(output.items()):
            output[key] = trimmed(value)
        return output


class _WidenEncoderMask:
    """Forward pre-hook of a decoder: makes it see the encoder's virtual positions."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = inputs_of(stack, args, kwargs)
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if states is None:
            return None
        wide = _wide_mask(self.encoder, mask, states.shape[0], states.shape[1], states.device)
        if wide is mask:
            return None
        inputs["encoder_attention_mask"] = wide
        return (), inputs


class _WidenPooledMask:
    """Forward pre-hook of a classifier that pools the mean: the mean is over the virtual tokens too, as in PEFT."""

    def __init__(self, stack: nn.Module) -> None:
        self.stack = stack

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = inputs_of(model, args, kwargs)
        size, tokens, device = size_of(inputs)
        slots, mask = slots_of(self.stack), inputs.get("attention_mask")
        n = 0 if slots is None else VirtualRows(slots, PromptModule, size).n
        wide = _wide_mask(self.stack, mask, size, n + tokens, device)
        if wide is mask:
            return None
        inputs["attention_mask"] = wide
        return (), inputs


def _wide_mask(encoder: nn.Module, mask: Tensor | None, size: int, length: int, device: torch.device) -> Tensor | None:
    """Return a mask over S = ``length`` positions of an encoder from one over T; the same object if nothing changes."""
    slots = slots_of(encoder)
    if slots is None:
        return mask
    rows = VirtualRows(slots, PromptModule, size)
    n, even = rows.n, len(set(rows.counts)) == 1
    if n == 0 or (mask is None and even) or (mask is not None and mask.shape[-1] != length - n):
        return mask
    if mask is None:
        mask = torch.ones(size, length - n, dtype=torch.long, device=device)
    return rows.layout(None, False, device).mask(mask)


def _embeddings(rows: VirtualRows[PromptModule], like: Tensor) -> Tensor:
    """Return each row's virtual tokens, (B, n, d), first its own."""
    if not rows.differ:
        values = torch.cat([module.vectors() for module in rows.modules[0]]).to(like.dtype)
        return values.expand(like.shape[0], -1, -1)
    distinct, index = rows.gather(like.device)
    return torch.cat([module.vectors() for module in distinct]).to(like.dtype)[index]


def _leads(mask: Tensor | None) -> Tensor | None:
    """Return the number of padding tokens in front of each row's text, (B, 1), or None without a mask.

    Whether there are any is not asked: the answer would be a wait for the device in every pass.
    """
    return None if mask is None else (mask != 0).long().cumsum(dim=1).eq(0).sum(dim=1, keepdim=True)


def _checked(inputs: dict[str, Any], cached: int, past: int, n: int, causal: bool) -> Tensor | None:
    """Return the mask of a call, once the call is known to give right results.

    Raises:
        UnsupportedError: a static cache, a mask that is not (B, T), or several texts in one row.
        ConflictError: the cache does not hold these virtual tokens.
        ConfigError: the mask has another length than the text.
    """
    cache, mask, positions = inputs.get("past_key_values"), inputs.get("attention_mask"), inputs.get("position_ids")
    text = past + size_of(inputs)[1]
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(
            "a static cache has no room for virtual tokens",
            hint="generate with the default (dynamic) cache, or use prefix tuning",
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedError(
            "virtual tokens need a mask with one number for each token (rows x tokens)",
            hint="pass the tokenizer's attention_mask, or use prefix tuning",
        )
    if cached:
        fits = cached > n and (mask is None or mask.shape[1] == text)
        if mask is None and positions is not None:
            fits = fits and int(positions[0, 0]) == past
        if not fits:
            raise ConflictError(
                f"the cache holds {cached} positions: not those of {n} virtual tokens and of the text before this call",
                hint="begin with an empty cache, and keep the same adapters active while it is in use",
            )
    elif mask is not None and mask.shape[1] != text and (causal or mask.shape[1] != text + n):
        raise ConfigError(f"attention_mask has {mask.shape[1]} columns for {text} tokens")
    if causal and mask is None and positions is not None and bool((positions.diff(dim=-1) < 1).any()):
        raise UnsupportedError(
            "several texts packed into one row cannot each have virtual tokens",
            hint="turn packing off, or use prefix tuning",
        )
    return mask


# -- building, installing, removing ---------------------------------------------------------------------------------


def build_modules(model: PreTrainedModel, method: Method, architecture: Architecture) -> dict[str, nn.Module]:
    """Build the module of a new prompt.

    Returns:
        By the path of the stack that reads the text (the encoder, if there are two).

    Raises:
        UnsupportedError: the architecture is not in the table.
    """
    assert isinstance(method, Prompt | PTuning)
    stack = next((stack for stack in architecture.stacks if stack.kind != "decoder"), None)
    if stack is None:
        raise UnsupportedError(
            f"{method.title} does not know which part of `{architecture.model_type}` reads the text",
            hint="use lora or bottleneck on this model",
        )
    embedding = model.get_submodule(stack.path).get_input_embeddings()
    return {stack.path: method.build_prompt(embedding, stack.width)}


def install_hooks(model: PreTrainedModel, model_adapters: ModelAdapters) -> None:
    """Make the reading stack, and modules that see its length, look for prompts. A second call changes nothing."""
    stacks = read_architecture(model).stacks
    reader = next(stack for stack in stacks if stack.kind != "decoder")
    host = model.get_submodule(reader.path)
    if any(isinstance(hook, _Insert) for hook in host._forward_pre_hooks.values()):
        return
    insert = _Insert(reader.kind == "causal")
    # Before a prefix's hook, which shifts the positions of virtual tokens too.
    host.register_forward_pre_hook(insert, with_kwargs=True, prepend=True)
    decoders = [model.get_submodule(stack.path) for stack in stacks if stack.kind == "decoder"]
    pools = host is not model and not insert.causal and _POOLS_FIRST.search(own_base(type(model)).__name__) is not None
    if not decoders and not pools:
        host.register_forward_hook(_Trim(insert), with_kwargs=True)
    for decoder in decoders:
        decoder.register_forward_pre_hook(_WidenEncoderMask(host), with_kwargs=True)
    if pools and getattr(model.config, "classifier_pooling", None) == "mean":
        model.register_forward_pre_hook(_WidenPooledMask(host), with_kwargs=True)


def remove_hooks(model: PreTrainedModel, model_adapters: ModelAdapters) -> None:
    """Remove all hooks of prompts."""
    for module in model.modules():
        drop_hooks(module, (_Insert, _Trim, _WidenEncoderMask, _WidenPooledMask))
