"""A graft as PEFT writes it down, and back: LoRA and IA3 here, `peft_linear.py` the other methods for linear layers,
`peft_virtual.py` virtual tokens.

PEFT's container is `adapter_config.json` beside `adapter_model.safetensors`, whose keys are
``base_model.model.<path>.<parameter>``; saved heads lie in it plainly. What PEFT has no method for uses the same
container under a ``peft_type`` of our own (``GRAFTWERK_BOTTLENECK``), with our raw keys behind the same prefix; its
settings stand in `graftwerk.json`.

PiSSA is stored as what PEFT converts it to: since s (B A - B0 A0) = s [B, -B0] [A; A0], an ordinary LoRA of rank 2r
with the same scale. A, B, A0, B0 themselves go beside it, so that training can go on.

Which layers are adapted, and at which rank, is read off the tensors, never off a pattern.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.methods.base import Method, TargetModule
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.adapter_config import OWN_PREFIX
from graftwerk.serialization.naming import endings, ends_with, layer_number, named_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
_LORA_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("MTModel", "SEQ_2_SEQ_LM"),
)


@dataclass(frozen=True)
class Stored:
    """What goes into a folder.

    Attributes:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`, by PEFT's keys.
        training: What PEFT's format leaves out and training needs to go on, by raw keys; often empty.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    training: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Restored:
    """What comes out of a folder: settings to attach, and tensors by raw keys."""

    method: Method
    tensors: dict[str, Tensor]


# -- writing ----------------------------------------------------------------------------------------------------------


def common_config(graft: Adapter, peft_type: str, base_name: str | None) -> dict[str, Any]:
    """The keys that every kind of adapter has."""
    model_class = type(graft.model)
    task = next((task for ending, task in _TASKS if model_class.__name__.endswith(ending)), None)
    if task == "SEQ_CLS" and not graft.heads:
        task = None  # PEFT would look for a saved classifier in the file
    return {
        "peft_type": peft_type,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": model_class.__name__, "parent_library": model_class.__module__},
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": list(graft.heads) or None,
    }


def write_lora(graft: Adapter, base_name: str | None) -> Stored:
    method = graft.method
    assert isinstance(method, LoRA)
    raw = graft.state_dict()
    pissa = method.init_lora_weights == "pissa"
    times = 2 if pissa else 1
    ranks = {place.path: method.rank(place.path) * times for place in graft.targets}
    alphas = {
        path: _plain(method.scale(path) * (math.sqrt(rank) if method.use_rslora else rank))
        for path, rank in ranks.items()
    }
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    config: dict[str, Any] = {
        **common_config(graft, "LORA", base_name),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.lora_dropout,
        **target_config(graft, list(ranks)),
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": any(_is_transposed(graft.model.get_submodule(path)) for path in ranks),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }
    if not pissa:
        return Stored(config, {PREFIX + key: tensor for key, tensor in raw.items()})
    tensors = {PREFIX + key: tensor for key, tensor in raw.items() if graft.is_head(key)}
    for path in ranks:
        a, b = raw[f"{path}.lora_A.weight"], raw[f"{path}.lora_B.weight"]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat((a, raw[f"{path}.start_A"]))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat((b, -raw[f"{path}.start_B"]), dim=1)
    return Stored(config, tensors, {key: tensor for key, tensor in raw.items() if not graft.is_head(key)})


def target_config(graft: Adapter, paths: list[str]) -> dict[str, Any]:
    """PEFT's way of naming exactly these layers: short endings, with the numbers of the layers where those say it."""
    modules = module_paths(graft.model, graft.heads)
    whole = {"target_modules": endings(paths, modules)}
    if getattr(graft.method, "layers", None) is None:
        return whole
    view = read_architecture(graft.model)
    places = [view.by_path[path] for path in paths]
    numbers = sorted({place.layer for place in places if place.layer is not None})
    ends = {_in_layer(place) for place in places}
    everywhere = [place.path for place in view.targets if place.layer is not None and _in_layer(place) in ends]
    lists = sorted(
        {
            path.rpartition(f".{layer}.{rest}")[0].rpartition(".")[2]
            for place in places
            for path, layer, rest in [(place.path, place.layer, _in_layer(place))]
        }
    )
    for pattern in (None, lists):
        short = {
            "target_modules": endings(everywhere, modules),
            "layers_to_transform": numbers,
            "layers_pattern": pattern,
        }
        if _listed_layers(graft.model, short, graft.heads) == set(paths):
            return short
    return whole  # the two halves of an encoder-decoder with different layers, say: PEFT has one list for both


def _in_layer(place: TargetModule) -> str:
    """A place's path within its layer."""
    parts = place.path.split(".")
    return ".".join(parts[parts.index(str(place.layer)) + 1 :])


def write_ia3(graft: Adapter, base_name: str | None) -> Stored:
    method = graft.method
    assert isinstance(method, IA3)
    modules = module_paths(graft.model, graft.heads)
    # PEFT wants the feed-forward entries among the targets, so each side is named on its own.
    inputs = endings([place.path for place in graft.targets if method.scales_input(place)], modules)
    outputs = endings([place.path for place in graft.targets if not method.scales_input(place)], modules)
    config = {
        **common_config(graft, "IA3", base_name),
        "target_modules": sorted({*inputs, *outputs}),
        "feedforward_modules": inputs,
        "fan_in_fan_out": any(_is_transposed(graft.model.get_submodule(place.path)) for place in graft.targets),
        "init_ia3_weights": True,
    }
    return Stored(config, {PREFIX + key: tensor for key, tensor in graft.state_dict().items()})


def write_own(graft: Adapter, base_name: str | None) -> Stored:
    """Kinds of adapters that PEFT does not have: our raw keys in PEFT's container."""
    config = common_config(graft, OWN_PREFIX + graft.method.name.upper(), base_name)
    return Stored(config, {PREFIX + key: tensor for key, tensor in graft.state_dict().items()})


def _plain(value: float) -> float | int:
    """16.000000000000004 -> 16."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value


def most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def module_paths(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """All modules that PEFT would compare its targets with: saved heads are never adapted."""
    return [path for path in base_modules(model) if path and not _within(path, heads)]


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)


def _is_transposed(module: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_lora(
    model: PreTrainedModel, view: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    layers, rest = by_layer(tensors, _LORA_PARTS)
    heads, raw = read_heads(model, config, rest, PREFIX)
    check_layers(model, view, config, layers, heads)
    parts = _LORA_PARTS if config.get("use_dora") else _LORA_PARTS[:2]
    faults = [f"{path}.{part}" for path, found in layers.items() for part in parts if part not in found]
    if faults:
        raise AdapterError(listed("missing", faults))
    faults = [f"{path}.{part}" for path, found in layers.items() for part in found if part not in parts]
    if faults:
        raise AdapterError(listed("not expected without use_dora", faults))
    ranks = {path: _rank(path, found) for path, found in layers.items()}
    patterned: dict[str, int] = config.get("rank_pattern") or {}
    rank: int = config["r"]
    for path, value in ranks.items():
        if value not in (rank, *patterned.values()):
            raise AdapterError(
                f"mis-shaped: {path}.lora_A.weight has rank {value}, but the settings say r={rank}",
                where="adapter_config.json",
            )
    alphas = {path: _from_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"]) for path in layers}
    init = str(config.get("init_lora_weights", True)).lower()
    method = LoRA.parse(
        {
            "r": rank,
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config.get("lora_dropout", 0.0),
            "target_modules": list(layers),
            "use_rslora": config.get("use_rslora", False),
            "use_dora": config.get("use_dora", False),
            # What PiSSA took out of the base is computed again when it is attached, as PEFT does.
            "init_lora_weights": "pissa" if init == "pissa" else True,
            "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != config["lora_alpha"]},
            "modules_to_save": heads,
        }
    )
    raw.update({f"{path}.{part}": tensor for path, found in layers.items() for part, tensor in found.items()})
    return Restored(method, raw)


def read_ia3(
    model: PreTrainedModel, view: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    layers, rest = by_layer(tensors, ("ia3_l",))
    heads, raw = read_heads(model, config, rest, PREFIX)
    check_layers(model, view, config, layers, heads)
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


def read_own(method: Method, tensors: Mapping[str, Tensor]) -> Restored:
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise AdapterError(listed("not known here", foreign))
    return Restored(method, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def read_heads(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Saved heads: their paths in the model, and their tensors by raw keys.

    Raises:
        AdapterError: a tensor that belongs to no saved module of this model, or a saved module without tensors.
    """
    names: Sequence[str] = config.get("modules_to_save") or ()
    modules = base_modules(model)
    heads: dict[str, None] = {}
    raw, unknown = {}, []
    for key, tensor in tensors.items():
        parts = key.removeprefix(prefix).split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        # PEFT compares letters, not components: `classifier` saves `pre_classifier` too.
        head = next((path for path in paths if path in modules and path.endswith(tuple(names))), None)
        if head is None or not key.startswith(prefix):
            unknown.append(key)
            continue
        heads[head] = None
        raw[key.removeprefix(prefix)] = tensor
    if unknown:
        raise AdapterError(listed("not known here", unknown), hint=_hint(model, unknown))
    missing = [
        path
        for path, module in model.named_children()
        if path.endswith(tuple(names)) and path not in heads and any(True for _ in module.parameters())
    ]
    if missing:
        raise AdapterError(listed("missing: the saved module", missing))
    return list(heads), raw


def _hint(model: nn.Module, unknown: Sequence[str]) -> str:
    if any("lora_embedding" in key for key in unknown):
        return "LoRA on embeddings is not supported"
    if any(part in key for key in unknown for part in ("embed", "lm_head", "wte")):
        return "it was saved with embeddings, usually of a vocabulary that was made larger; that is not supported"
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
    model: nn.Module, view: Architecture, config: Mapping[str, Any], layers: Mapping[str, Any], heads: Sequence[str]
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
    outside = [path for path in layers if path not in view.by_path]
    if outside:
        raise UnsupportedError(
            f"the adapter changes `{outside[0]}`, which is no linear layer of the base",
            hint="only those can be adapted",
        )
    expected = _listed_layers(model, config, heads)
    if expected is None:
        return
    missing = [path for path in expected if path in view.by_path and path not in layers]
    if missing:
        raise AdapterError(listed("missing: target_modules lists the layer", missing))
    extra = [path for path in layers if path not in expected]
    if extra:
        raise AdapterError(listed("not among target_modules: the layer", extra))


def _listed_layers(model: nn.Module, config: Mapping[str, Any], heads: Sequence[str]) -> set[str] | None:
    """The layers that the settings list by name; None where they give a pattern, which is not evaluated."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    names = config.get("layers_pattern") or None
    names = [names] if isinstance(names, str) else names
    if not isinstance(targets, list) or not isinstance(excluded, list):
        return None
    if names is not None and not all(name.replace(".", "").isidentifier() for name in names):
        return None
    wanted = config.get("layers_to_transform")
    numbers = [wanted] if isinstance(wanted, int) else wanted
    found = set()
    for path in module_paths(model, heads):
        if not ends_with(path, targets) or ends_with(path, excluded):
            continue
        # A target that is a whole path is adapted whatever its layer's number.
        if numbers and path not in targets and layer_number(path, names) not in numbers:
            continue
        found.add(path)
    return found


def _rank(path: str, found: Mapping[str, Tensor]) -> int:
    a, b = found["lora_A.weight"], found["lora_B.weight"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"mis-shaped: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, not (r, in) and (out, r)"
        )
    return a.shape[0]


def _from_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if named_by(key, path)), default)


def listed(what: str, keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{what} {', '.join(key[:200] for key in keys[:most])}{more} ({len(keys)} in all)"
