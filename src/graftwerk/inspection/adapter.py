"""Description of an adapter folder, with the norm of the update by layer, from its files alone: no model is loaded.

For a method that adds a product of matrices to a layer (LoRA's s B A, a bottleneck's up · down), the norm is that of
the product, which is what acts; for IA3 the distance of the scales from one; else that of the stored tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.errors import UnsupportedError
from graftwerk.serialization.adapter_config import KEYS
from graftwerk.serialization.folder import read_adapter_config
from graftwerk.serialization.info import AdapterInfo, check_files
from graftwerk.serialization.naming import Budget, ends_with, named_by
from graftwerk.serialization.peft_parameters import SETTING
from graftwerk.serialization.restore import INDICES
from graftwerk.serialization.vocabulary import BASE_LAYER
from graftwerk.serialization.weight_files import read_weights, weight_files

_PREFIXES = ("base_model.model.", "base_model.")
_LAYER = re.compile(r"(?:^|\.)(?:[A-Za-z_]\w*)\.(\d+)(?=\.|$)")
_SINGLE = {
    "ia3_l": "scales, less one",
    "bitfit_b": "bias",
    "lora_magnitude_vector": "magnitudes",
    "miss_block": "shared block",
    "shira_weight": "sparse update",
    "oft_R.weight": "angles of rotation",
    "token_adapter.trainable_tokens_delta": "rows of tokens",
    "prefix_key": "prefix keys",
    "prefix_value": "prefix values",
    "prompt_embeddings": "virtual tokens",
}
"""Parameters of methods that stand for themselves -> what their norm is of."""

_PRODUCTS = (
    (".lora_A.weight", ".lora_B.weight", "update"),
    (".lora_embedding_A", ".lora_embedding_B", "update"),
    (".hira_A", ".hira_B", "factor on the weight, less one"),
)
"""Endings of the two matrices of a product, A and B -> what their product is."""


@dataclass(frozen=True)
class Learnt:
    """One thing that was learnt.

    Attributes:
        module: Path of the module it acts on; "" for the input embeddings.
        layer: The layer it belongs to, as ``bert.encoder.layer.3``; None outside the layers.
        what: What the norm is of.
        parameters: Numbers stored for it.
        norm: Frobenius norm.
        rank: Rank of a product of matrices; None for anything else.
        stable_rank: Its squared norm over its largest squared singular value: in how many directions it really acts.
    """

    module: str
    layer: str | None
    what: str
    parameters: int
    norm: float
    rank: int | None = None
    stable_rank: float | None = None


def describe_adapter(folder: Path | str) -> dict[str, Any]:
    """Describe an adapter folder from its settings and tensors.

    Args:
        folder: The adapter folder, ours or PEFT's.

    Returns:
        ``folder``, ``peft_type``, ``method``, ``name``, ``base`` (name, fingerprint), ``labels``, ``parameters``,
        ``bytes``, ``learnt`` (one entry per module and kind of parameter), ``layers`` (norm and parameters by layer),
        ``metadata`` (the rest of `graftwerk.json`: data, metrics, cost, command, versions).

    Raises:
        IntegrityError, ConfigError, AdapterError, UnsupportedError, ResourceError: As for reading untrusted files.

    Example:
        >>> from graftwerk import describe_adapter
        >>> describe_adapter("runs/nothing-here")
        Traceback (most recent call last):
        graftwerk.errors.ResourceError: there is no folder ...runs/nothing-here
        ...
    """
    info = read_adapter_config(folder)
    if info.own:
        check_files(info)
    tensors = read_weights(info)
    learnt = list(what_was_learnt(info, tensors))
    own = info.own
    taken = ("format", "name", "base", "method", "labels", "files")
    return {
        "folder": str(info.folder),
        "peft_type": info.peft_type,
        "method": own.get("method") or _effective_settings(info.config),
        "name": info.name,
        "base": {"name": info.base_name, "fingerprint": info.base_fingerprint},
        "labels": info.labels,
        "parameters": sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(INDICES)),
        "bytes": sum(file.stat().st_size for file in weight_files(info)),
        "learnt": [vars(one) for one in learnt],
        "layers": by_layer(learnt),
        "metadata": {key: value for key, value in own.items() if key not in taken},
    }


def what_was_learnt(info: AdapterInfo, tensors: Mapping[str, Tensor]) -> Iterator[Learnt]:
    """Yield one entry per module and kind of parameter, in the order of the layers.

    Args:
        info: Contents of the adapter folder.
        tensors: The folder's tensors by PEFT's keys, any shape.
    """
    left = {_plain_key(key): tensor for key, tensor in tensors.items() if not key.endswith(INDICES)}
    found = [
        *_parameters(info, left),
        *_low_rank(info, left),
        *_bottlenecks(left),
        *_prefix_of_peft(info, left),
        *_singles(left),
    ]
    found += _saved_modules(left)
    yield from sorted(found, key=lambda one: _in_order(one.module))


def by_layer(learnt: list[Learnt]) -> list[dict[str, Any]]:
    """Return the norm of everything within a layer; head and embeddings have names of their own."""
    layers: dict[str, list[Learnt]] = {}
    for one in learnt:
        layers.setdefault(one.layer or one.module or "input embeddings", []).append(one)
    return [
        {
            "layer": name,
            "modules": len({one.module for one in ones}),
            "parameters": sum(one.parameters for one in ones),
            "norm": math.sqrt(sum(one.norm**2 for one in ones)),
        }
        for name, ones in layers.items()
    ]


# -- kinds of parameters; each takes what it knows out of `left` -------------------------------------------------------


def _parameters(info: AdapterInfo, left: dict[str, Tensor]) -> Iterator[Learnt]:
    """Yield the updates of bare parameters: for each expert a product, whose norms are taken together.

    The keys name the owner of a parameter. If several of its parameters are targeted and their ranks or scales differ,
    only a model could tell which update is whose; the norm is then that of the stored tensors.
    """
    names = info.config.get(SETTING) or []
    layers = info.config.get("target_modules") or []
    budget, ending = Budget(), ".lora_A.weight"
    for key in [key for key in left if names and key.endswith(ending)]:
        module = key.removesuffix(ending)
        owner, partner = module.replace(f".{BASE_LAYER}", ""), f"{module}.lora_B.weight"
        if partner not in left or (owner == module and isinstance(layers, list) and ends_with(owner, layers)):
            continue
        a, b = left.pop(key), left.pop(partner)
        owned = [f"{owner}.{name.rpartition('.')[2]}" for name in names if _owns(owner, name)]
        numbers = a.numel() + b.numel()
        ranks = {_rank(info.config, path, budget) for path in owned}
        rank = ranks.pop() if len(ranks) == 1 else 0
        scales = {_scale(info.config, path, rank, budget) for path in owned} if rank else set()
        if len(scales) != 1 or a.shape[0] % rank:
            norm = math.hypot(_norm(a), _norm(b))
            yield Learnt(module, _layer(module), "A and B as stored", numbers, norm)
            continue
        a_e = a.float().reshape(-1, rank, a.shape[1])  # (E, r, in)
        b_e = b.float().reshape(b.shape[0], rank, -1).permute(2, 0, 1)  # (E, out, r)
        norm = scales.pop() * math.sqrt(max(0.0, float(((b_e.mT @ b_e) * (a_e @ a_e.mT)).sum())))
        where = owned[0] if len(owned) == 1 else module
        yield Learnt(where, _layer(where), f"updates of {a_e.shape[0]} experts", numbers, norm, rank=rank)


def _owns(owner: str, name: str) -> bool:
    """Return True if the ending of a parameter's path may name one of this module."""
    above = name.rpartition(".")[0]
    return not above or ends_with(owner, [above])


def _rank(config: Mapping[str, Any], path: str, budget: Budget) -> int:
    for key, value in (config.get("rank_pattern") or {}).items():
        try:
            if named_by(key, path, budget):
                return int(value)
        except UnsupportedError:
            continue
    return int(config["r"])


def _low_rank(info: AdapterInfo, left: dict[str, Tensor]) -> Iterator[Learnt]:
    budget = Budget()
    for ending_a, ending_b, what in _PRODUCTS:
        for key in [key for key in left if key.endswith(ending_a)]:
            module = key.removesuffix(ending_a)
            a, b = left.pop(key), left.pop(module + ending_b, None)
            if b is None:
                left[key] = a
                continue
            yield _product(module, what, b, a, _scale(info.config, module, a.shape[0], budget))


def _bottlenecks(left: dict[str, Tensor]) -> Iterator[Learnt]:
    ending = ".bottleneck.down.weight"
    for key in [key for key in left if key.endswith(ending)]:
        module = key.removesuffix(ending)
        parts = {name: left.pop(name) for name in list(left) if name.startswith(f"{module}.bottleneck.")}
        up = parts.get(f"{module}.bottleneck.up.weight")
        if up is None:
            left.update(parts)
            continue
        one = _product(module, "up · down", up, parts[key], 1.0)
        total = sum(tensor.numel() for tensor in parts.values())
        yield Learnt(one.module, one.layer, one.what, total, one.norm, one.rank, one.stable_rank)


def _prefix_of_peft(info: AdapterInfo, left: dict[str, Tensor]) -> Iterator[Learnt]:
    """PEFT keeps all layers in one tensor (n, layers · 2 · width): per token [layer, key or value, head, dim]."""
    layers = info.config.get("num_layers")
    vectors = left.get("prompt_embeddings")
    if info.peft_type != "PREFIX_TUNING" or vectors is None or not layers or vectors.shape[1] % (2 * layers):
        return
    del left["prompt_embeddings"]
    split = vectors.view(vectors.shape[0], layers, -1)
    for layer in range(layers):
        part = split[:, layer]
        yield Learnt(f"layer.{layer}", f"layer.{layer}", "prefix keys and values", part.numel(), _norm(part))


def _singles(left: dict[str, Tensor]) -> Iterator[Learnt]:
    for key in list(left):
        parameter = next((name for name in _SINGLE if key == name or key.endswith("." + name)), None)
        if parameter is None:
            continue
        module, what = key[: -len(parameter)].removesuffix("."), _SINGLE[parameter]
        tensor = left.pop(key)
        norm = _norm(tensor.float() - 1) if parameter == "ia3_l" else _norm(tensor)
        yield Learnt(module, _layer(module), what, tensor.numel(), norm)


def _saved_modules(left: Mapping[str, Tensor]) -> Iterator[Learnt]:
    """Yield modules stored whole, heads above all: `classifier.weight` and `classifier.bias` are one."""
    modules: dict[str, list[Tensor]] = {}
    for key, tensor in left.items():
        modules.setdefault(key.rpartition(".")[0] or key, []).append(tensor)
    for module, parts in modules.items():
        norm = math.sqrt(sum(_norm(part) ** 2 for part in parts))
        yield Learnt(module, _layer(module), "weights", sum(part.numel() for part in parts), norm)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _product(module: str, what: str, left: Tensor, right: Tensor, scale: float) -> Learnt:
    """Return the norms of ``scale · left @ right``, (out, r) by (r, in), from the triangles of their QR factors."""
    thin_left, thin_right = torch.linalg.qr(left.float()).R, torch.linalg.qr(right.float().T).R
    singular = scale * torch.linalg.svdvals(thin_left @ thin_right.T)
    norm, largest = float(singular.norm()), float(singular.max())
    stable = (norm / largest) ** 2 if largest > 0 else 0.0
    numbers = left.numel() + right.numel()
    return Learnt(module, _layer(module), what, numbers, norm, rank=right.shape[0], stable_rank=stable)


def _scale(config: Mapping[str, Any], module: str, rank: int, budget: Budget) -> float:
    alpha = float(config.get("lora_alpha", rank))
    for key, value in (config.get("alpha_pattern") or {}).items():
        try:
            if named_by(key, module, budget):
                alpha = float(value)
                break
        except UnsupportedError:
            continue
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _norm(tensor: Tensor) -> float:
    return float(tensor.float().norm())


# -- names -------------------------------------------------------------------------------------------------------------


def _effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of PEFT's that decide what is computed, without those that are off."""
    known = KEYS.get(str(config.get("peft_type")), {})
    return {
        key: value
        for key, value in config.items()
        if key in known
        and known[key].use == "read"
        and key not in ("peft_type", "base_model_name_or_path")
        and value not in (None, [], {}, False, "none", "")
    }


def _plain_key(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _layer(module: str) -> str | None:
    """Convert `bert.encoder.layer.3.output.dense` to `bert.encoder.layer.3`."""
    found = _LAYER.search(module)
    return module[: found.end()] if found else None


def _in_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Sort layer 10 after layer 9, and heads, which have no number, after the layers beside them."""
    if _layer(module) is None and module:
        return ((2, 0, module),)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in module.split("."))
