"""Task heads: every adapter trains a copy of its own, the base's head stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import AdapterError, ConfigError
from graftwerk.inject.drawn import within
from graftwerk.inject.frugal import give_back
from graftwerk.inject.hooks import unhook
from graftwerk.inject.layers import restore
from graftwerk.inject.record import CHILD, Box
from graftwerk.inject.structure import base_modules
from graftwerk.inject.targets import Anatomy
from graftwerk.methods.base import Method, Place, onloaded


def head_paths(model: nn.Module, method: Method, anatomy: Anatomy) -> tuple[str, ...]:
    """Return the paths of the modules that an adapter of this method trains and stores whole.

    `modules_to_save` names modules by their endings, as target lists do. A module inside another saved one is part of
    that one's copy, and is not listed again.

    Raises:
        ConfigError: `modules_to_save` names a module that the model does not have, or one without parameters.
    """
    if method.modules_to_save == "auto":
        return anatomy.heads
    modules = base_modules(model)
    paths = []
    for name in method.modules_to_save:
        found = [path for path in modules if path and (path == name or path.endswith("." + name))]
        if not found:
            raise ConfigError(
                f"modules_to_save: there is no module `{name}` in {type(model).__name__}",
                where="method.modules_to_save",
                mend=f"its top-level modules are: {', '.join(n for n, _ in model.named_children())}",
            )
        if not any(parameter is not None for path in found for parameter in modules[path].parameters()):
            raise ConfigError(
                f"modules_to_save: `{name}` has no parameters, so there is nothing to train or save",
                where="method.modules_to_save",
                mend="leave it out",
            )
        paths.extend(found)
    return tuple(path for path in dict.fromkeys(paths) if not within(path.rpartition(".")[0], paths))


def open_places(method: Method, anatomy: Anatomy, heads: Sequence[str]) -> list[Place]:
    """Return the places that a method works in: those it selects, without the modules that are saved whole.

    As in PEFT, a saved module is never adapted as well: the copy answers in place of the base's layer.
    """
    return [place for place in method.places(anatomy.places) if not within(place.path, heads)]


def copy_head(module: nn.Module) -> nn.Module:
    """Copy a module of the base as a trainable float32 module; no adapter on it, or inside it, is copied."""
    boxes: dict[int, Any] = {id(part._modules[CHILD]): None for part in module.modules() if CHILD in part._modules}
    with onloaded(module):
        head = copy.deepcopy(module, boxes)  # every box is copied as None
    for part in head.modules():
        restore(part)
    give_back(head.modules())  # a frugal class is for frozen modules
    unhook(head)  # the base's head keeps its hooks, and asks its copies
    return head.float().requires_grad_(True)


def check_vocabulary(model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if a saved embedding, of inputs or outputs, is of another vocabulary than the model's.

    Args:
        path: The saved module.
        tensors: Its stored tensors by their names inside it.
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
                mend=f"if its vocabulary was resized: model.resize_token_embeddings({stored.shape[0]}) before loading",
            )


def fit_head(box: Box, name: str, tensors: Mapping[str, Tensor], where: str, classes: int) -> int | None:
    """Make an adapter's copy of a linear head as wide as the stored one, so that each adapter keeps its own labels.

    Args:
        tensors: The head's stored tensors by their names inside the head (`weight`, `out_proj.bias`, ...).
        classes: How many classes the base's head tells apart: only a layer of so many outputs can have others.

    Returns:
        How many classes the stored head tells apart, or None if this module does not tell.
    """
    head = box.get(name)
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
                mend="the adapter belongs to a base of another width",
            )
        wider = nn.Linear(module.in_features, stored.shape[0], bias=module.bias is not None).to(module.weight.device)
        if path:
            parent, _, child = path.rpartition(".")
            setattr(head.get_submodule(parent), child, wider)
        else:
            box.put(name, wider)
    return found
