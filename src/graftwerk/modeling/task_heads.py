"""Task heads: every adapter trains a copy of its own, the base's head stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graftwerk.errors import AdapterError, ConfigError
from graftwerk.methods.base import Method, onloaded
from graftwerk.modeling.accelerate_compat import unhook
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.module_index import base_modules


def head_paths(model: nn.Module, method: Method, architecture: Architecture) -> tuple[str, ...]:
    """Return the paths of the modules that an adapter of this method trains and stores whole.

    Raises:
        ConfigError: `modules_to_save` names a module that the model does not have.
    """
    if method.modules_to_save == "auto":
        return architecture.heads
    modules = base_modules(model)
    paths = []
    for name in method.modules_to_save:
        found = [path for path in modules if path == name or path.endswith("." + name)]
        if not found:
            raise ConfigError(
                f"modules_to_save: there is no module `{name}` in {type(model).__name__}",
                where="method.modules_to_save",
                hint=f"its top-level modules are: {', '.join(n for n, _ in model.named_children())}",
            )
        paths.extend(found)
    return tuple(dict.fromkeys(paths))


def copy_head(module: nn.Module) -> nn.Module:
    """Return a trainable float32 copy of the base's head, without adapters on it."""
    slots = module._modules.pop(CHILD, None)
    adapted = module.__class__
    module.__class__ = getattr(adapted, "_graftwerk_base", adapted)
    try:
        with onloaded(module):
            # Tensors are cloned beforehand, since `deepcopy` makes fake ones those of another mode.
            memo: dict[int, Any] = {id(buffer): buffer.clone() for buffer in module.buffers()}
            memo |= {id(own): nn.Parameter(own.detach().float().clone()) for own in module.parameters()}
            head = copy.deepcopy(module, memo)
    finally:
        module.__class__ = adapted
        if slots is not None:
            module._modules[CHILD] = slots
    unhook(head)  # the base's head keeps its hooks, and asks its copies
    return head.requires_grad_(True)


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
        wider = nn.Linear(module.in_features, stored.shape[0], bias=module.bias is not None).to(module.weight.device)
        if path:
            parent, _, child = path.rpartition(".")
            setattr(head.get_submodule(parent), child, wider)
        else:
            slots.put(name, wider)
    return found
