"""Modules that the checkpoint of a model lacked, so that transformers drew their weights at random.

Such a part (a pooler, a classifier's dense layer, a projection) differs from load to load, and an adapter that was
trained on top of it is wrong on the next one. So it is trained and stored with the adapter, like a task head.

transformers marks each parameter that it reads from a checkpoint; those without the mark were drawn. A model none of
whose parameters has the mark (made from a configuration, a deep copy) says nothing about where its weights are from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.methods.base_weights import is_quantized
from graftwerk.methods.placement import onloaded
from graftwerk.modeling.adapter_slots import CHILD
from graftwerk.modeling.module_index import ModuleIndex, module_index

_MARK = "_is_hf_initialized"
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


def drawn_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the largest modules that consist of nothing but weights drawn at random.

    Weights that start constant (biases, norms) are the same everywhere, and tables that are computed (sinusoids) are no
    weights: a module with nothing else is not named. Neither is the output embedding, nor a part of a numbered layer:
    they are too large to be stored, and their values count in the base's digests instead.
    """
    base, lacking = module_index(model), unmarked(model)
    found: dict[str, None] = {}
    for name in sorted(lacking):
        path = name.rpartition(".")[0]
        if within(path, found) or not _may_be_stored(model, base, path, lacking):
            continue
        if _is_random(base.modules[path], name.rpartition(".")[2]):
            found[_widest(model, base, path, lacking)] = None
    return tuple(path for path in found if not within(path, [other for other in found if other != path]))


def unmarked(model: PreTrainedModel) -> set[str]:
    """Return the names of parameters that were not read from a checkpoint; none for a model that does not say."""
    parameters = module_index(model).parameters
    found = {name for name, parameter in parameters.items() if not hasattr(parameter, _MARK)}
    return set() if len(found) == len(parameters) else found


def within(path: str, modules: Iterable[str]) -> bool:
    """Return whether a module, or a parameter of it, belongs to one of these modules."""
    return any(path == module or path.startswith(module + ".") for module in modules)


def _may_be_stored(model: PreTrainedModel, base: ModuleIndex, path: str, lacking: set[str]) -> bool:
    module = base.modules[path]
    whole = module not in (model, model.base_model) and module is not model.get_output_embeddings()
    return whole and _IN_A_LAYER.search(f"{path}.") is None and _all_unmarked(base, path, lacking)


def _all_unmarked(base: ModuleIndex, path: str, lacking: set[str]) -> bool:
    own = [name for name, _ in base.modules[path].named_parameters(remove_duplicate=False)]
    # One that is tied to another stands in the structure under the other's name, and is not all this module's.
    return all(CHILD in name.split(".") or f"{path}.{name}" in lacking for name in own)


def _widest(model: PreTrainedModel, base: ModuleIndex, path: str, lacking: set[str]) -> str:
    """Return the outermost module around ``path`` that can be stored and called whole."""
    parent = path.rpartition(".")[0]
    if not parent or not _may_be_stored(model, base, parent, lacking):
        return path
    if isinstance(base.modules[parent], nn.ModuleList | nn.ModuleDict):
        return path
    return _widest(model, base, parent, lacking)


def _is_random(module: nn.Module, name: str) -> bool:
    if "Sinusoidal" in type(module).__name__:
        return False
    with onloaded(module):
        weight = module._parameters[name]
        assert isinstance(weight, Tensor)
        if weight.is_meta or is_quantized(weight) or weight.numel() == 0:
            return False
        low, high = torch.aminmax(weight.detach().float())
    return bool(low < high)
