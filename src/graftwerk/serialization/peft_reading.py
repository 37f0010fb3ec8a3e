"""LoRA and IA3 out of PEFT's container: settings and raw tensors for a model. `peft_format.py` is the way back.

Which layers are adapted, and at which rank, is read off the tensors, never off a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.linear_probe import Probe
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.naming import Budget, named_by
from graftwerk.serialization.peft_format import LORA_PARTS, PREFIX, Restored, listed_layers
from graftwerk.serialization.peft_parameters import split_parameters
from graftwerk.serialization.peft_tokens import split_tokens
from graftwerk.serialization.vocabulary import (
    check_rows,
    embedding_paths,
    folded_layer,
    replace_tables,
    same_values,
    split_base_layers,
    split_copies,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_lora(
    model: PreTrainedModel, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    """Read a LoRA, DoRA included.

    Args:
        model: The model that it is for.
        architecture: Its architecture.
        config: The adapter's configuration in PEFT's terms.
        tensors: The adapter's tensors by PEFT's keys: ``lora_A.weight`` (r, in), ``lora_B.weight`` (out, r), saved
            modules and weights of the base of any shape. Parameters have the tensors that `split_parameters` names.

    Returns:
        Settings and tensors. They are those of a probe if every layer becomes a saved module.

    Raises:
        AdapterError: a tensor is missing, is not known here, has another shape than the settings say, or belongs to
            another vocabulary.
        UnsupportedError: the adapter changes an embedding, or another weight of the base that cannot be replaced.
    """
    _refuse_embeddings(model, tensors)
    tensors, tokens = split_tokens(model, architecture, config, tensors, PREFIX)
    parameters, tensors = split_parameters(model, architecture, config, tensors, PREFIX)
    tensors, replaced = split_base_layers(model, tensors, PREFIX)
    layers, rest = by_layer(tensors, LORA_PARTS)
    heads, raw = read_heads(model, config, rest, PREFIX, adapted=layers)
    if layers or not parameters or config.get("target_modules"):
        check_layers(model, architecture, config, layers, heads)
    parts = LORA_PARTS if config.get("use_dora") else LORA_PARTS[:2]
    faults = [f"{path}.{part}" for path, found in layers.items() for part in parts if part not in found]
    if faults:
        raise AdapterError(listed("missing", faults))
    faults = [f"{path}.{part}" for path, found in layers.items() for part in found if part not in parts]
    if faults:
        raise AdapterError(listed("not expected without use_dora", faults))
    ranks = {path: _rank(path, found) for path, found in layers.items()}
    experts = {target.path: target.experts for target in architecture.parameters if target.path in parameters}
    ranks |= {path: _rank(path, found) // experts[path] for path, found in parameters.items()}
    patterned: dict[str, int] = config.get("rank_pattern") or {}
    rank: int = config["r"]
    for path, value in ranks.items():
        if value not in (rank, *patterned.values()):
            raise AdapterError(
                f"mis-shaped: {path}.lora_A.weight has rank {value}, but the settings say r={rank}",
                where="adapter_config.json",
            )
    alpha_pattern, budget = config.get("alpha_pattern") or {}, Budget()
    alphas = {
        path: next((value for key, value in alpha_pattern.items() if named_by(key, path, budget)), config["lora_alpha"])
        for path in ranks
    }
    for path in [path for path in replaced if path in layers]:
        found = layers.pop(path)
        scale = alphas.pop(path) / (math.sqrt(ranks[path]) if config.get("use_rslora") else ranks[path])
        raw.update(folded_layer(model, config, path, replaced[path], scale, found))
        heads.append(path)
        replace_tables(model, {path: replaced[path]}, heads, raw)
        ranks.pop(path)
    replace_tables(model, tokens.tables, heads, raw)
    if not ranks:
        if tokens.setting:
            raise UnsupportedError(
                "the folder replaces every layer that it adapts, and trains rows of an embedding beside them",
                hint="load the base model that the adapter was trained on, with its resized vocabulary",
            )
        return Restored(Probe(modules_to_save=tuple(heads)), raw)
    init = str(config.get("init_lora_weights", True)).lower()
    method = LoRA.parse(
        {
            "r": rank,
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config.get("lora_dropout", 0.0),
            "target_modules": list(layers),
            "target_parameters": list(parameters),
            "use_rslora": config.get("use_rslora", False),
            "use_dora": config.get("use_dora", False),
            # What PiSSA took out of the base is computed again when it is attached, as PEFT does.
            "init_lora_weights": "pissa" if init == "pissa" else True,
            "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != config["lora_alpha"]},
            "modules_to_save": heads,
            "trainable_token_indices": tokens.setting,
        }
    )
    layers |= parameters
    raw.update({f"{path}.{part}": tensor for path, found in layers.items() for part, tensor in found.items()})
    raw.update(tokens.rows)
    return Restored(method, raw)


def read_ia3(
    model: PreTrainedModel, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    """Read an IA3.

    Args:
        model: The model that it is for.
        architecture: Its architecture.
        config: The adapter's configuration in PEFT's terms.
        tensors: The adapter's tensors by PEFT's keys: ``ia3_l`` (1, in) or (out, 1), saved modules of any shape.

    Returns:
        Settings and tensors.

    Raises:
        AdapterError: a tensor is missing, is not known here, has another shape, or belongs to another vocabulary.
        UnsupportedError: the folder replaces a weight of the base.
    """
    layers, rest = by_layer(refuse_resized(model, tensors), ("ia3_l",))
    heads, raw = read_heads(model, config, rest, PREFIX, adapted=layers)
    check_layers(model, architecture, config, layers, heads)
    vectors = {path: found["ia3_l"] for path, found in layers.items()}
    for path, vector in vectors.items():
        if vector.dim() != 2 or 1 not in vector.shape:
            raise AdapterError(
                f"mis-shaped: {path}.ia3_l has shape {tuple(vector.shape)}, which is no row and no column"
            )
    # A row (1, in) scales what goes into a layer, a column (out, 1) what comes out.
    inputs = [path for path, vector in vectors.items() if vector.shape[0] == 1]
    method = IA3.parse({"target_modules": list(layers), "feedforward_modules": inputs, "modules_to_save": heads})
    raw.update({f"{path}.ia3_l": vector for path, vector in vectors.items()})
    return Restored(method, raw)


def refuse_resized(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors without the weights of the base that PEFT stores beside them and that equal the model's.

    Args:
        model: The base.
        tensors: Tensors of any shape by PEFT's keys.

    Raises:
        UnsupportedError: a weight is another than the model's, as after a resize of the vocabulary.
    """
    tensors, replaced = split_base_layers(model, tensors, PREFIX)
    if replaced:
        raise UnsupportedError(
            f"the folder holds a weight of the base for `{next(iter(replaced))}` that is not this model's",
            hint="load the base model that the adapter was trained on, with its resized vocabulary",
        )
    return tensors


def read_own(method: Method, tensors: Mapping[str, Tensor]) -> Restored:
    """Read a method that PEFT does not have.

    Args:
        method: Its settings.
        tensors: The adapter's tensors by stored keys, any shape.

    Returns:
        Settings and tensors.

    Raises:
        AdapterError: a key has another prefix.
    """
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise AdapterError(listed("not known here", foreign))
    return Restored(method, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def read_heads(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str,
    *,
    adapted: Collection[str] = (),
) -> tuple[list[str], dict[str, Tensor]]:
    """Read the saved modules.

    Args:
        model: The model that they are for.
        config: The adapter's configuration in PEFT's terms.
        tensors: All tensors but those of adapted layers by PEFT's keys, any shape.
        prefix: Prefix of the keys.
        adapted: Paths of the adapted layers.

    Returns:
        Paths in the model, and tensors by raw keys.

    Raises:
        AdapterError: a tensor that belongs to no saved module of this model, a saved module without tensors, or an
            embedding of another vocabulary.
    """
    names: Sequence[str] = config.get("modules_to_save") or ()
    modules = base_modules(model)
    embeddings = embedding_paths(model)
    heads: dict[str, None] = {}
    tables: dict[str, dict[str, Tensor]] = {}
    raw: dict[str, Tensor] = {}
    unknown = []
    tensors, originals = split_copies(tensors, prefix)
    for key, tensor in tensors.items():
        parts = key.removeprefix(prefix).split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        # PEFT compares letters, not components: `classifier` saves `pre_classifier` too.
        head = next((path for path in paths if path in modules and path.endswith(tuple(names))), None)
        table = next((path for path in paths if path in embeddings), None)
        if (head is None and table is None) or not key.startswith(prefix):
            unknown.append(key)
            continue
        if table is not None:
            check_rows(table, tensor, modules[table]._parameters.get(parts[-1]))
            if head is None:
                tables.setdefault(table, {})[parts[-1]] = tensor
                continue
        assert head is not None
        heads[head] = None
        raw[key.removeprefix(prefix)] = tensor
    if unknown:
        raise AdapterError(listed("not known here", unknown), hint=_hint(model, unknown))
    missing = [
        path
        for path, module in modules.items()
        if path.endswith(tuple(names)) and not within(path, heads) and any(True for _ in module.parameters())
    ]
    if missing:
        raise AdapterError(listed("missing: the saved module", missing))
    found = list(heads)
    for table, stored in (*tables.items(), *originals.items()):
        if table not in modules:
            continue
        own = modules[table]._parameters
        if not all(same_values(tensor, own.get(name)) for name, tensor in stored.items()):
            replace_tables(model, {table: stored}, found, raw, adapted)
    return found, raw


def _refuse_embeddings(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError, which names the setting, for LoRA on an embedding."""
    modules = base_modules(model)
    for key in tensors:
        layer, found, _ = key.removeprefix(PREFIX).partition(".lora_embedding_")
        if found and isinstance(modules.get(layer), nn.Embedding):
            raise UnsupportedError(
                f"`target_modules` names the embedding `{layer[:200]}`: LoRA on embeddings is not supported",
                where="adapter_config.json",
                hint="train with the embedding among modules_to_save, or merge the adapter with PEFT",
            )


def _hint(model: nn.Module, unknown: Sequence[str]) -> str:
    if any(part in key for key in unknown for part in ("classifier", "score", "classification_head")):
        return f"the adapter has a task head and {type(model).__name__} none: load the model with one"
    return "the adapter was made for another architecture, or is of a variant that is not known here"


def by_layer(
    tensors: Mapping[str, Tensor], parts: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return adapter tensors of any shape by layer and part, and all others by their keys."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        part = next((part for part in parts if key.startswith(PREFIX) and key.endswith("." + part)), None)
        if part is None:
            rest[key] = tensor
        else:
            layers.setdefault(key[len(PREFIX) : -len(part) - 1], {})[part] = tensor
    return layers, rest


def check_layers(
    model: nn.Module,
    architecture: Architecture,
    config: Mapping[str, Any],
    layers: Mapping[str, Any],
    heads: Sequence[str],
) -> None:
    """Check that the layers that a file has tensors for are the model's, and those that the settings list.

    Raises:
        AdapterError: the file has no tensors, or a layer is missing, is not known or is not among the targets.
        UnsupportedError: a layer is no linear one.
    """
    if not layers:
        raise AdapterError("the file has no tensors of an adapter in it")
    modules = base_modules(model)
    unknown = [path for path in layers if path not in modules]
    if unknown:
        raise AdapterError(
            listed("not known here: the layer", unknown), hint="the adapter was made for another architecture"
        )
    outside = [path for path in layers if path not in architecture.by_path]
    if outside:
        raise UnsupportedError(
            f"the adapter changes `{outside[0]}`, which is no linear layer of the base",
            hint="only those can be adapted",
        )
    expected = listed_layers(model, config, heads)
    if expected is None:
        return
    missing = [path for path in expected if path in architecture.by_path and path not in layers]
    if missing:
        raise AdapterError(listed("missing: target_modules lists the layer", missing))
    extra = [path for path in layers if path not in expected]
    if extra:
        raise AdapterError(listed("not among target_modules: the layer", extra))


def _rank(path: str, found: Mapping[str, Tensor]) -> int:
    a, b = found["lora_A.weight"], found["lora_B.weight"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"mis-shaped: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, not (r, in) and (out, r)"
        )
    return a.shape[0]


def listed(what: str, keys: Sequence[str], most: int = 8) -> str:
    """Return a message with the first ``most`` keys and the number of all."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{what} {', '.join(key[:200] for key in keys[:most])}{more} ({len(keys)} in all)"
