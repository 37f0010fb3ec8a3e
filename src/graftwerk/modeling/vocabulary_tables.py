"""The tables of a model: its embeddings and the layers that score its vocabulary, and which of them share a weight.

A table's rows can be adapted only where every module that holds its weight is called, as an embedding or as a linear
layer: a module that reads the weight would see the base's rows.
"""

from __future__ import annotations

from contextlib import suppress

from torch import nn
from transformers import PreTrainedModel

from graftwerk.kernels.memory_efficient import own_base
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.base_weights import is_coded
from graftwerk.methods.placement import OFFLOAD_HOOK
from graftwerk.modeling.layer_checks import embedding_unfit, is_weight_only, unfit
from graftwerk.modeling.module_index import base_modules

_READERS = frozenset(
    {
        "MobileBertLMPredictionHead",
        "DebertaLMPredictionHead",
        "DebertaV2LMPredictionHead",
        "CpmAntForCausalLM",
        "DiffusionGemmaDecoderModel",
    }
)
"""Classes that read the weight of the input embedding, or of a layer tied to it, without calling the module."""


def read_tables(model: PreTrainedModel) -> tuple[TargetModule, ...]:
    """Return the tables of a model: of those that share a weight the input embedding first, the others tied to it."""
    inputs: nn.Module | None = None
    with suppress(NotImplementedError):  # models of speech and images read no tokens
        inputs = model.get_input_embeddings()
    outputs, modules = model.get_output_embeddings(), base_modules(model)
    first = {id(module): path for path, module in reversed(modules.items())}  # shared modules under their first path
    owners: dict[int, list[str]] = {}
    for path in (path for path, module in modules.items() if first[id(module)] == path):
        for parameter in modules[path]._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    roots: list[str] = [path for path in first.values() if isinstance(modules[path], nn.Embedding)]
    roots.sort(key=lambda path: modules[path] is not inputs)  # stable: the input embedding before all others
    if outputs is not None and isinstance(outputs, nn.Linear) and id(outputs) in first:
        roots.append(first[id(outputs)])
    found: dict[str, TargetModule] = {}
    for root in roots:
        if root in found:
            continue
        tied = owners.get(id(modules[root]._parameters.get("weight")), [])
        reads_input = modules[root] is inputs
        reader = _reader(modules) if reads_input else None
        for path in (root, *(other for other in tied if other != root)):
            module = modules[path]
            reason = reader or _unfit(modules, path)
            if isinstance(module, nn.Embedding):
                size, role = (module.num_embeddings, module.embedding_dim), Role.EMBEDDING
            elif isinstance(module, nn.Linear):
                size, role = (module.in_features, module.out_features), Role.VOCABULARY
            else:
                size, role = (0, 0), Role.EMBEDDING
            has_bias = module._parameters.get("bias") is not None
            found[path] = TargetModule(
                path,
                role,
                *size,
                has_bias,
                unfit=reason,
                is_input=reads_input and path == root,
                tied_to=None if path == root else root,
            )
    return tuple(found.values())


def _reader(modules: dict[str, nn.Module]) -> str | None:
    """Return the reason why no row of the input embedding can be adapted, if the model reads it uncalled."""
    names = (own_base(type(module)).__name__ for module in modules.values())
    name = next((name for name in names if name in _READERS), None)
    return None if name is None else f"{name} reads its weight, or that of a layer tied to it, without a call"


def _unfit(modules: dict[str, nn.Module], path: str) -> str | None:
    """Return the reason why no row can be adapted in one module, or None if rows can be."""
    module = modules[path]
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Embedding | nn.Linear):
        return f"a {own_base(type(module)).__name__} holds its weight too"
    if weight is None:
        return "its weight is computed from others (a parametrization)"
    if weight.is_meta and OFFLOAD_HOOK in module.__dict__:
        return "its weight is offloaded, so that which modules share it is not known"
    if is_coded(weight):
        return "its weight is quantized"
    parent, _, name = path.rpartition(".")
    if is_weight_only(modules[parent], name):
        return "it is never called: its weight is read"
    return embedding_unfit(module) if isinstance(module, nn.Embedding) else unfit(module)
