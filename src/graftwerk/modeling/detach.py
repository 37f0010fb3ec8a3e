"""Detach adapters from a model, one by one or all of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError
from graftwerk.modeling.adapted_module import make_memory_efficient, restore, restore_modules
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.build import HOOKED
from graftwerk.modeling.module_index import base_parameters, forget, module_index
from graftwerk.modeling.quantized_layers import REPACKS


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Detach every adapter: classes, parameters, flags, hooks and configuration are those from before.

    Args:
        model: A model with or without adapters.

    Returns:
        The model.

    Raises:
        UnsupportedError: the base's weights are lost: full fine-tuning ran, or an adapter was merged, with
            ``keep_base=False``.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach, detach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> before = list(model.state_dict())
        >>> _ = attach(model, LoRA(r=2))
        >>> list(detach(model).state_dict()) == before
        True
    """
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None:
        return model
    for adapter in model_adapters.adapters.values():
        adapter.unmerge()  # first, since it may not be possible
    for name in list(model_adapters.adapters):
        remove(model, name)
    model_adapters.restore_flags(base_parameters(model))
    for module in model_adapters.packed_later:
        setattr(module, REPACKS, True)
    ModelAdapters.forget(model)
    forget(model)
    return model


def remove(model: PreTrainedModel, name: str) -> None:
    """Delete one adapter; modules that no adapter touches any more get their own class back.

    Raises:
        ConfigError: there is no such adapter.
    """
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None or name not in model_adapters.adapters:
        raise ConfigError(f"there is no adapter `{name}` on this model")
    adapter = model_adapters.adapters[name]
    adapter.unmerge()
    if adapter.weights is not None:
        adapter.put_weights(live=False)
        for parameter in adapter.weights.parameters.values():
            parameter.requires_grad_(False)
    selection = model_adapters.selection
    if selection.rows is not None and name in selection.rows:
        selection.choose(())
    selection.names = tuple(one for one in selection.names if one != name)
    model_adapters.discard(name)
    base = module_index(model)
    _clear(model_adapters, name, [base.modules[path] for path in dict.fromkeys((*adapter.hosts, *adapter.heads))])
    _tidy(model, model_adapters, [adapter.method.kind])
    model_adapters.sync()


def remove_parts(model: PreTrainedModel, name: str) -> None:
    """Delete an adapter whose attaching failed, however far it came."""
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None:
        return
    if name in model_adapters.adapters:
        remove(model, name)
        return
    hosts = [host for host in module_index(model).modules.values() if slots_of(host) is not None]
    _clear(model_adapters, name, hosts)
    _tidy(model, model_adapters, HOOKED)


def _clear(model_adapters: ModelAdapters, name: str, hosts: Iterable[nn.Module]) -> None:
    """Take an adapter's modules out of their hosts; a host without any gets its own class back."""
    for host in hosts:
        slots = slots_of(host)
        assert slots is not None
        slots.remove(name)
        if slots.empty:
            restore(host)
            make_memory_efficient([host], model_adapters.selection.activations)


def _tidy(model: PreTrainedModel, model_adapters: ModelAdapters, kinds: Iterable[str]) -> None:
    """Undo what no adapter needs any more: memory-efficient classes, and the hooks of these kinds of methods."""
    if not model_adapters.adapters:
        restore_modules(module_index(model).modules.values())
    for kind in kinds:
        if kind in HOOKED and not any(other.method.kind == kind for other in model_adapters.adapters.values()):
            HOOKED[kind].remove_hooks(model, model_adapters)
