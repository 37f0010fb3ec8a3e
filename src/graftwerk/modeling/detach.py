"""Taking adapters off a model, one by one or all of them."""

from __future__ import annotations

from types import MappingProxyType

from transformers import PreTrainedModel

from graftwerk.errors import ConfigError
from graftwerk.modeling import prefix_attention, prompt_embedding
from graftwerk.modeling.adapted_module import make_memory_efficient, restore, restore_modules
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.module_index import base_parameters, forget, module_index

HOOKED = MappingProxyType({"attention": prefix_attention, "embedding": prompt_embedding})
"""For each kind of method that does not work inside single layers, the file that builds, hooks and unhooks it."""


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take every graft off: classes, parameters, flags, hooks and configuration are those from before.

    Raises:
        UnsupportedError: the base's weights are gone: full fine-tuning ran, or an adapter was merged, with
            ``keep_base=False``.
    """
    record = ModelAdapters.of(model)
    if record is None:
        return model
    for graft in record.adapters.values():
        graft.unmerge()  # before anything is taken off: it may not be possible
    for name in list(record.adapters):
        remove(model, name)
    record.restore_flags(base_parameters(model))
    ModelAdapters.forget(model)
    forget(model)
    return model


def remove(model: PreTrainedModel, name: str) -> None:
    """Delete one adapter; modules that no adapter touches any more get their own class back."""
    record = ModelAdapters.of(model)
    if record is None or name not in record.adapters:
        raise ConfigError(f"there is no adapter `{name}` on this model")
    graft = record.adapters[name]
    graft.unmerge()
    if graft.weights is not None:
        graft.put_weights(live=False)
        for parameter in graft.weights.parameters.values():
            parameter.requires_grad_(False)
    selection = record.selection
    if selection.rows is not None and name in selection.rows:
        selection.choose(())
    selection.names = tuple(one for one in selection.names if one != name)
    del record.adapters[name]
    base = module_index(model)
    for path in dict.fromkeys((*graft.hosts, *graft.heads)):
        host = base.modules[path]
        box = slots_of(host)
        assert box is not None
        box.remove(name)
        if box.empty:
            restore(host)
            make_memory_efficient([host], record.selection.activations)
    if not record.adapters:
        restore_modules(base.modules.values())
    kind = graft.method.kind
    if kind in HOOKED and not any(other.method.kind == kind for other in record.adapters.values()):
        HOOKED[kind].remove_hooks(model, record)
    record.sync()
