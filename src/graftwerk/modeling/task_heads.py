"""Task heads: every adapter trains a copy of its own, the base's head stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import AdapterError, ConfigError
from graftwerk.methods.base import Method, TargetModule
from graftwerk.methods.placement import onloaded
from graftwerk.modeling.accelerate_compat import unhook
from graftwerk.modeling.active_adapters import ActiveAdapters
from graftwerk.modeling.adapted_module import restore, restore_modules
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots, slots_of
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_modules


def head_paths(model: nn.Module, method: Method, architecture: Architecture) -> tuple[str, ...]:
    """Return the paths of the modules that an adapter of this method trains and stores whole.

    `modules_to_save` names modules by their endings, as target lists do. A module inside another saved one is part of
    that one's copy, and is not listed again.

    Raises:
        ConfigError: `modules_to_save` names a module that the model does not have, or one without parameters.
    """
    if method.modules_to_save == "auto":
        return architecture.heads
    modules = base_modules(model)
    paths = []
    for name in method.modules_to_save:
        found = [path for path in modules if path and (path == name or path.endswith("." + name))]
        if not found:
            raise ConfigError(
                f"modules_to_save: there is no module `{name}` in {type(model).__name__}",
                where="method.modules_to_save",
                hint=f"its top-level modules are: {', '.join(n for n, _ in model.named_children())}",
            )
        if not any(parameter is not None for path in found for parameter in modules[path].parameters()):
            raise ConfigError(
                f"modules_to_save: `{name}` has no parameters, so there is nothing to train or save",
                where="method.modules_to_save",
                hint="leave it out",
            )
        paths.extend(found)
    return tuple(path for path in dict.fromkeys(paths) if not within(path.rpartition(".")[0], paths))


def open_targets(method: Method, architecture: Architecture, heads: Sequence[str]) -> list[TargetModule]:
    """Return the targets of a method without those in modules that are saved whole; tables with trained rows last.

    As in PEFT, a saved module is never adapted as well: its copy computes in place of the base's layer.

    Args:
        method: A method that works inside layers.
        architecture: The model's.
        heads: Paths of the saved modules, from `head_paths`.

    Raises:
        ConfigError: rows would train of a table that is saved whole, or that the method adapts as a layer.
    """
    layers = method.select_targets(architecture.candidates(method))
    if heads:
        layers = [target for target in layers if not within(target.path, heads)]
    rows = method.trained_rows(architecture.tables)
    if not rows:
        return layers
    adapted = {target.path for target in layers}
    tables = [table for table in architecture.tables if (table.tied_to or table.path) in rows]
    for table in tables:
        if table.path in adapted or within(table.path, heads):
            how = "adapted as a layer" if table.path in adapted else "trained whole"
            raise ConfigError(
                f"`{table.path}` is {how}, and single rows of its weight would train as well",
                where="method.trainable_token_indices",
                hint="leave the rows out, or this module out of target_modules and modules_to_save",
            )
    return [*layers, *tables]


def copy_head(module: nn.Module) -> nn.Module:
    """Return a trainable float32 copy of a module of the base, without adapters on it or inside it.

    Args:
        module: Any module of the base; its tensors may have any shape.
    """
    copies: dict[int, Any] = {id(part._modules[CHILD]): None for part in module.modules() if CHILD in part._modules}
    with onloaded(module):
        # Tensors are cloned beforehand, since `deepcopy` makes fake ones those of another mode.
        copies |= {id(buffer): _float_clone(buffer) for buffer in module.buffers()}
        copies |= {id(own): nn.Parameter(_float_clone(own.detach()), False) for own in module.parameters()}
        head = copy.deepcopy(module, copies)
    for part in head.modules():
        restore(part)
    restore_modules(head.modules())  # a memory-efficient class is for frozen modules
    unhook(head)  # the base's head keeps its hooks, and asks its copies
    return head.requires_grad_(True)


def _float_clone(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor (any shape), as float32 if it is of a floating-point dtype."""
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def check_vocabulary(model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that a saved embedding, of inputs or outputs, has as many rows as the model's.

    Args:
        model: The model.
        path: The saved module.
        tensors: Its stored tensors by their names inside it; that of an embedding is (V, D), the others any shape.

    Raises:
        AdapterError: an embedding is of another vocabulary; the message says how to resize the model's.
    """
    module = base_modules(model)[path]
    for inner, part in module.named_modules():
        stored = tensors.get(f"{inner}.weight" if inner else "weight")
        if stored is None or not (isinstance(part, nn.Embedding) or part is model.get_output_embeddings()):
            continue
        assert isinstance(part.weight, Tensor)
        if stored.dim() == 2 and stored.shape[0] != part.weight.shape[0]:
            raise AdapterError(
                f"the stored `{path}` has {stored.shape[0]:,} rows, and the model's has {part.weight.shape[0]:,}",
                where=path,
                hint=f"if its vocabulary was resized: model.resize_token_embeddings({stored.shape[0]}) before loading",
            )


def fit_head(slots: AdapterSlots, name: str, tensors: Mapping[str, Tensor], where: str, classes: int) -> int | None:
    """Make an adapter's copy of a linear head as wide as the stored one, so that each adapter keeps its own labels.

    Args:
        slots: The slots of the head.
        name: The adapter.
        tensors: The head's stored tensors, any shape, by their names in the head (`weight`, `out_proj.bias`, ...).
        where: Path of the head, for messages.
        classes: Number of classes of the base's head: only a layer with this many outputs can have others.

    Returns:
        Number of classes of the stored head, or None if this module does not tell.

    Raises:
        AdapterError: the stored head reads another width.
    """
    head = slots.get(name)
    assert head is not None
    found = None
    for path, module in list(head.named_modules()):
        key = f"{path}.weight" if path else "weight"
        stored = tensors.get(key)
        if not isinstance(module, nn.Linear) or stored is None or module.out_features != classes:
            continue
        found = stored.shape[0] if stored.dim() == 2 else None
        if stored.shape == module.weight.shape:
            continue
        if stored.dim() != 2 or stored.shape[1] != module.in_features:
            raise AdapterError(
                f"the stored head has shape {tuple(stored.shape)}, the model's {tuple(module.weight.shape)}",
                where=f"{where}.{key}",
                hint="the adapter belongs to a base of another width",
            )
        wider = nn.Linear(module.in_features, stored.shape[0], bias=module.bias is not None).to(module.weight)
        if path:
            parent, _, child = path.rpartition(".")
            setattr(head.get_submodule(parent), child, wider)
        else:
            slots.put(name, wider)
    return found


def stored_heads(
    model: PreTrainedModel, paths: Sequence[str], tensors: Mapping[str, Tensor], classes: int
) -> dict[str, nn.Module]:
    """Return frozen heads with stored values, each as wide as its own labels need, for `lent_heads`.

    Args:
        model: The model that the heads are for.
        paths: Paths of the heads.
        tensors: Stored tensors by raw key, any shape; those of other modules are left out.
        classes: Number of classes of the model's own head.

    Raises:
        AdapterError: a head is not stored, or has another shape.
    """
    heads = {}
    for path in paths:
        inner = {key.removeprefix(f"{path}."): tensor for key, tensor in tensors.items() if within(key, [path])}
        slots = AdapterSlots(ActiveAdapters())
        slots.put("stored", copy_head(base_modules(model)[path]))
        fit_head(slots, "stored", inner, path, classes)
        head = slots.get("stored")
        assert head is not None
        try:
            head.load_state_dict(inner)
        except RuntimeError:
            raise AdapterError(
                f"the stored adapter has no head that fits `{path}`", where=path, hint="was it trained for this model?"
            ) from None
        heads[path] = head.requires_grad_(False)
    return heads


@contextmanager
def lent_heads(model: PreTrainedModel, name: str, heads: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let other heads answer inside the block in place of an adapter's own, or of the model's if it has none there.

    Args:
        model: The model.
        name: The adapter.
        heads: By path, on any device: they move to the model's, and into its mode.
    """
    put_back: list[tuple[nn.Module, str, nn.Module | None]] = []
    for path, head in heads.items():
        host = base_modules(model)[path]
        slots, (parent, _, child) = slots_of(host), path.rpartition(".")
        own = slots is not None and slots.get(name) is not None
        holder, key = (slots, name) if slots is not None and own else (model.get_submodule(parent), child)
        put_back.append((holder, key, holder._modules[key]))
        head.to(next(host.parameters()).device).train(model.training)
    try:
        for (holder, key, _), head in zip(put_back, heads.values(), strict=True):
            holder._modules[key] = head
        yield
    finally:
        for holder, key, before in put_back:
            holder._modules[key] = before
