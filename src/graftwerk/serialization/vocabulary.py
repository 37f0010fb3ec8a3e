"""Embeddings and heads that PEFT stores beside an adapter, all under the names that they had in its wrapped model.

PEFT writes *everything* below the input and output embeddings of a model whose vocabulary was resized, or whose
embeddings are among the targets:

    X.weight                                            what answers: a saved module, or the resized base's own weight
    X.modules_to_save.weight, X.original_module.weight  of a saved module: its trained copy once more, and the base's
    X.base_layer.weight                                 of an adapted layer: the base's own weight
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.methods.base_weights import is_transposed
from graftwerk.modeling.module_index import base_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_LAYER = "base_layer"
_ORIGINAL = "original_module"
_COPIES = ("modules_to_save", _ORIGINAL)


def embedding_paths(model: PreTrainedModel) -> list[str]:
    """Return the paths of a model's input and output embeddings."""
    tables: list[nn.Module | None] = [model.get_output_embeddings()]
    with suppress(NotImplementedError):  # models of speech read no tokens
        tables.append(model.get_input_embeddings())
    found = {id(table) for table in tables if table is not None}
    return [path for path, module in base_modules(model).items() if id(module) in found]


def split_copies(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Take `X.<copy>.weight` of saved modules out, wherever `X.weight` itself is there.

    Args:
        tensors: By PEFT's keys, any shape.
        prefix: Prefix of the keys.

    Returns:
        All other tensors, and by path the weights that the base had there, by parameter.
    """
    kept: dict[str, Tensor] = {}
    originals: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, copy, name = next((key.rpartition(f".{copy}.") for copy in _COPIES if f".{copy}." in key), ("", "", ""))
        if f"{path}.{name}" not in tensors:
            kept[key] = tensor
        elif copy == f".{_ORIGINAL}.":
            originals.setdefault(path.removeprefix(prefix), {})[name] = tensor
    return kept, originals


def split_base_layers(
    model: nn.Module, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Take the base's own weights of adapted layers out of an adapter's tensors.

    Args:
        model: The model.
        tensors: By PEFT's keys, any shape.
        prefix: Prefix of the keys.

    Returns:
        All other tensors, and by path the weights of layers that are not those of this model, by parameter.

    Raises:
        AdapterError: They have another shape: the vocabulary was resized.
    """
    modules = base_modules(model)
    kept: dict[str, Tensor] = {}
    other: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, found, name = key.removeprefix(prefix).rpartition(f".{BASE_LAYER}.")
        if not found or path not in modules:
            kept[key] = tensor
            continue
        check_rows(path, tensor, modules[path]._parameters.get(name))
        if not same_values(tensor, modules[path]._parameters.get(name)):
            other.setdefault(path, {})[name] = tensor
    return kept, other


def same_values(stored: Tensor, own: Tensor | None) -> bool:
    """Return True if a stored weight (any shape) is the model's own, in the coarser of their dtypes."""
    if own is None or own.shape != stored.shape or not own.is_floating_point():
        return False
    own = own.detach().to(stored.device)
    dtype = min(stored.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(dtype), own.to(dtype))


def check_rows(path: str, stored: Tensor, own: Tensor | None) -> None:
    """Check that an embedding was stored for the model's vocabulary.

    Args:
        path: The embedding, for the message.
        stored: Its stored weight (V, D) or bias (V,).
        own: The model's, or None if it has none.

    Raises:
        AdapterError: the numbers of rows differ; the message says how to resize the model.
    """
    if own is None or own.dim() != stored.dim() or own.shape == stored.shape or own.shape[1:] != stored.shape[1:]:
        return
    raise AdapterError(
        f"`{path}` was stored for a vocabulary of {stored.shape[0]:,} tokens, and this model has {own.shape[0]:,}",
        hint=f"load it with the tokenizer of the adapter and model.resize_token_embeddings({stored.shape[0]}) first",
    )


def folded_layer(
    model: nn.Module, config: Mapping[str, Any], path: str, base: Mapping[str, Tensor], scale: float, parts: Any
) -> dict[str, Tensor]:
    """Return the whole layer, by raw keys, of an adapted one whose stored base weight is not this model's.

    PEFT loads that weight into the base. Ours stays as it is: the sum of weight and update becomes a saved module.

    Args:
        model: The model.
        config: The adapter's configuration in PEFT's terms.
        path: The layer.
        base: Its stored weight (out, in), bias (out,), or both, by parameter.
        scale: Factor on the update.
        parts: The update by parameter: ``lora_A.weight`` (r, in) and ``lora_B.weight`` (out, r).

    Returns:
        Weight (out, in) and bias (out,), if the layer has one, as float32.

    Raises:
        UnsupportedError: DoRA, whose update is no sum, or a layer that is stored in part.
    """
    own = base_modules(model)[path]._parameters
    if config.get("use_dora") or is_transposed(base_modules(model)[path]):
        raise UnsupportedError(
            f"the folder holds a weight of the base for `{path}` that is not this model's, and the variant of LoRA on "
            f"it cannot be added to that",
            hint="load the base model that the adapter was trained on, with its resized vocabulary",
        )
    weight = base.get("weight", own["weight"])
    assert weight is not None
    update = parts["lora_B.weight"].float() @ parts["lora_A.weight"].float()
    layer = {f"{path}.weight": weight.detach().float() + scale * update.to(weight.device)}
    bias = base.get("bias", own.get("bias"))
    if bias is not None:
        layer[f"{path}.bias"] = bias.detach().float().clone()
    return layer


def replace_tables(
    model: nn.Module,
    tables: Mapping[str, Mapping[str, Tensor]],
    heads: list[str],
    raw: dict[str, Tensor],
    adapted: Collection[str] = (),
) -> None:
    """Make saved modules of base weights that a folder replaces, and of all modules that are tied to them.

    PEFT writes such a weight into the base, and so into every module that shares it. What the folder does not hold of a
    module (a bias) is the base's.

    Args:
        model: The model.
        tables: Stored weights by path and parameter, any shape.
        heads: Paths of saved modules; added to.
        raw: Their tensors by raw keys; added to.
        adapted: Paths of layers that are adapted, whose own base weight the folder holds too.
    """
    modules = base_modules(model)
    for path, stored in tables.items():
        own = modules[path]._parameters.get("weight")
        tied = [
            other for other, module in modules.items() if own is not None and module._parameters.get("weight") is own
        ]
        for other in [path, *tied]:
            if other not in heads and other not in adapted:
                heads.append(other)
                for name, parameter in modules[other].state_dict().items():
                    source = stored.get(name) if other == path or name == "weight" else None
                    raw[f"{other}.{name}"] = parameter.detach().clone() if source is None else source.clone()


def saved_by_letters(modules: Mapping[str, nn.Module], heads: Sequence[str]) -> list[str]:
    """Return the modules that PEFT would save beside these: it compares letters, so `classifier` is `pre_classifier`.

    PEFT does not load a folder without them.
    """
    found = [path for path in modules if path.endswith(tuple(heads)) and path not in heads] if heads else []
    return [path for path in found if any(True for _ in modules[path].parameters())]
