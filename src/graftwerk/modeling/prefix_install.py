"""Prefixes into a model and out again: their modules, the attention function in its configuration, hooks on its stacks.

Legend: B rows, T tokens of the text, n virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from graftwerk.errors import ConflictError, UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.methods.prefix_tuning import Prefix, PrefixMLP, PrefixModule, PrefixVectors, ProjectedPrefix
from graftwerk.modeling.adapter_slots import AdapterSlots, ModelAdapters, slots_of
from graftwerk.modeling.architectures import Architecture, AttentionLayer, LayerStack, read_architecture
from graftwerk.modeling.prefix_attention import MASKS, OURS, configs_of, masks_of
from graftwerk.modeling.prefix_start import starting_values
from graftwerk.modeling.virtual_positions import (
    cached_tokens,
    check_positions,
    counts_of,
    drop_hooks,
    inputs_of,
    own_positions,
    size_of,
)

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
    starts = starting_values(model, method, chosen)
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


# -- which implementation a model uses ------------------------------------------------------------------------------


def _check_implementation(model: PreTrainedModel) -> None:
    for config in configs_of(model):
        name = (config._attn_implementation or "").removeprefix(OURS)
        if name not in ("", *MASKS):
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
        if config._attn_implementation in MASKS:
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
        masks_of(all_slots[0]).begin_pass()
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
