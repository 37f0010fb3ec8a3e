"""Adapters in PEFT's format: LoRA and IA3.

`peft_linear.py` has the other methods for linear layers, `peft_virtual.py` virtual tokens; reading is in
`peft_reading.py`. PEFT's format is `adapter_config.json` beside `adapter_model.safetensors`, whose keys are
``base_model.model.<path>.<parameter>``; saved heads are in it as they are. Methods that PEFT lacks use the same files
under a ``peft_type`` of our own (``GRAFTWERK_BOTTLENECK``), with our raw keys after the same prefix; their settings
are in `graftwerk.json`.

PiSSA is stored as PEFT converts it: since s (B A - B0 A0) = s [B, -B0] [A; A0], it is an ordinary LoRA of rank 2r with
the same scale. A, B, A0, B0 themselves are stored beside it, so that training can continue.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.methods.base import Method, Role, TargetModule
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.lora import LoRA
from graftwerk.methods.trainable_tokens import ROWS
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.adapter_config import OWN_PREFIX
from graftwerk.serialization.naming import dotted, endings, layer_number
from graftwerk.serialization.peft_parameters import parameter_names, stored_paths
from graftwerk.serialization.peft_tokens import token_config, tokens_apart
from graftwerk.serialization.vocabulary import (
    saved_by_letters,
)

PREFIX = "base_model.model."
LORA_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT's wrappers save for a task, whatever the settings say."""
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
    """Contents of an adapter folder to write.

    Attributes:
        config: Contents of `adapter_config.json`.
        tensors: Tensors of `adapter_model.safetensors` by PEFT's keys, any shape.
        training: Tensors by raw key that PEFT's format lacks and further training needs; often empty.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    training: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Restored:
    """Contents of an adapter folder that was read.

    Attributes:
        method: Settings to attach.
        tensors: Tensors by raw key, any shape.
    """

    method: Method
    tensors: dict[str, Tensor]


# -- writing ----------------------------------------------------------------------------------------------------------


def common_config(adapter: Adapter, peft_type: str, base_name: str | None) -> dict[str, Any]:
    """Return the keys that every kind of adapter has."""
    model_class = type(adapter.model)
    task = _task_type(adapter)
    return {
        "peft_type": peft_type,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": model_class.__name__, "parent_library": model_class.__module__},
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": list(adapter.heads) or None,
    }


def _task_type(adapter: Adapter) -> str | None:
    """Return the task whose wrapper of PEFT can call this model, None for PEFT's plain wrapper.

    A wrapper for a task hands `input_ids` on, which models of speech and images do not take, and looks for the task's
    head among the saved modules.
    """
    model = adapter.model
    name = getattr(type(model), "_graftwerk_base", type(model)).__name__
    task = next((task for ending, task in _TASKS if name.endswith(ending)), None)
    if task is None or "input_ids" not in signature(model.forward).parameters:
        return None
    if task == "SEQ_2_SEQ_LM" and not model.config.is_encoder_decoder:
        return None
    modules = base_modules(model)
    wanted = saved_by_letters(modules, _HEADS_OF_TASKS.get(task, ()))
    wanted += [head for head in _HEADS_OF_TASKS.get(task, ()) if head in modules]
    saved = [*adapter.heads, *saved_by_letters(modules, adapter.heads)]
    if task in _HEADS_OF_TASKS and (not adapter.heads or not all(within(path, saved) for path in wanted)):
        return None
    return task


def head_tensors(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of the saved modules for a file, with those that PEFT saves with them by their letters.

    Returns:
        By PEFT's keys, any shape; they share memory with the model.
    """
    tensors = {prefix + key: tensor for key, tensor in adapter.state_dict().items() if adapter.is_head(key)}
    modules = base_modules(adapter.model)
    for path in saved_by_letters(modules, adapter.heads):
        if not within(path, adapter.heads):
            for name, tensor in modules[path].state_dict().items():
                tensors[f"{prefix}{path}.{name}"] = tensor
    return tensors


def own_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors by raw key after PEFT's prefix, any shape, its head's as PEFT names them."""
    own = {PREFIX + key: tensor for key, tensor in adapter.state_dict().items() if not adapter.is_head(key)}
    return {**own, **head_tensors(adapter, PREFIX)}


def write_lora(adapter: Adapter, base_name: str | None) -> Stored:
    """Return the contents of the folder of a LoRA, DoRA or PiSSA adapter."""
    method = adapter.method
    assert isinstance(method, LoRA)
    raw = adapter.state_dict()
    parameters = [target.path for target in adapter.targets if target.role is Role.PARAMETER]
    modules = [target.path for target in adapter.targets if target.role is not Role.PARAMETER and not target.is_table]
    transposed = any(_is_transposed(adapter.model.get_submodule(path)) for path in modules)
    if parameters and transposed:
        return write_own(adapter, base_name)  # PEFT has no parameters beside GPT-2's layers
    pissa = method.init_lora_weights == "pissa"
    times = 2 if pissa else 1
    ranks = {target.path: method.rank_at(target.path) * times for target in adapter.targets if not target.is_table}
    alphas = {
        path: _plain(method.scale_at(path) * (math.sqrt(rank) if method.use_rslora else rank))
        for path, rank in ranks.items()
    }
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    config: dict[str, Any] = {
        **common_config(adapter, "LORA", base_name),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.lora_dropout,
        **target_config(adapter, modules),
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        **token_config(adapter),
    }
    if parameters:
        config["target_parameters"] = parameter_names(read_architecture(adapter.model), parameters)
    if not pissa:
        tensors = {**own_tensors(adapter), **tokens_apart(adapter, PREFIX)}
        for path, stored in stored_paths(adapter.model, parameters).items():
            for part in LORA_PARTS[:2]:
                tensors[f"{PREFIX}{stored}.{part}"] = tensors.pop(f"{PREFIX}{path}.{part}")
        return Stored(config, tensors)
    tensors = {**head_tensors(adapter, PREFIX), **tokens_apart(adapter, PREFIX)}
    tensors |= {PREFIX + key: tensor for key, tensor in raw.items() if key.endswith(f".{ROWS}")}
    for path in ranks:
        a, b = raw[f"{path}.lora_A.weight"], raw[f"{path}.lora_B.weight"]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat((a, raw[f"{path}.start_A"]))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat((b, -raw[f"{path}.start_B"]), dim=1)
    return Stored(config, tensors, {key: tensor for key, tensor in raw.items() if not adapter.is_head(key)})


def target_config(adapter: Adapter, paths: list[str]) -> dict[str, Any]:
    """Return PEFT's keys that name exactly these layers: short endings, with layer numbers where these suffice."""
    modules = module_paths(adapter.model, adapter.heads)
    whole = {"target_modules": endings(paths, modules)}
    if getattr(adapter.method, "layers", None) is None or not paths:
        return whole
    architecture = read_architecture(adapter.model)
    targets = [architecture.by_path[path] for path in paths]
    numbers = sorted({target.layer for target in targets if target.layer is not None})
    ends = {_in_layer(target) for target in targets}
    everywhere = [
        target.path for target in architecture.targets if target.layer is not None and _in_layer(target) in ends
    ]
    lists = sorted(
        {
            path.rpartition(f".{layer}.{rest}")[0].rpartition(".")[2]
            for target in targets
            for path, layer, rest in [(target.path, target.layer, _in_layer(target))]
        }
    )
    for pattern in (None, lists):
        short = {
            "target_modules": endings(everywhere, modules),
            "layers_to_transform": numbers,
            "layers_pattern": pattern,
        }
        if listed_layers(adapter.model, short, adapter.heads) == set(paths):
            return short
    return whole  # the two halves of an encoder-decoder with different layers, say: PEFT has one list for both


def _in_layer(target: TargetModule) -> str:
    """Return a module's path within its layer."""
    parts = target.path.split(".")
    return ".".join(parts[parts.index(str(target.layer)) + 1 :])


def write_ia3(adapter: Adapter, base_name: str | None) -> Stored:
    """Return the contents of the folder of an IA3 adapter."""
    method = adapter.method
    assert isinstance(method, IA3)
    modules = module_paths(adapter.model, adapter.heads)
    # PEFT wants the feed-forward entries among the targets, so each side is named on its own.
    inputs = endings([target.path for target in adapter.targets if method.scales_input(target)], modules)
    outputs = endings([target.path for target in adapter.targets if not method.scales_input(target)], modules)
    config = {
        **common_config(adapter, "IA3", base_name),
        "target_modules": sorted({*inputs, *outputs}),
        "feedforward_modules": inputs,
        "fan_in_fan_out": any(_is_transposed(adapter.model.get_submodule(target.path)) for target in adapter.targets),
        "init_ia3_weights": True,
    }
    return Stored(config, own_tensors(adapter))


def write_own(adapter: Adapter, base_name: str | None) -> Stored:
    """Return the contents of a folder for an adapter that PEFT does not have: our raw keys in PEFT's container."""
    config = common_config(adapter, OWN_PREFIX + adapter.method.name.upper(), base_name)
    return Stored(config, {PREFIX + key: tensor for key, tensor in adapter.state_dict().items()})


def _plain(value: float) -> float | int:
    """Convert 16.000000000000004 to 16."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value


def most_common(values: Iterable[Any]) -> Any:
    """Return the most frequent of the values, the first of these if there are several."""
    return Counter(values).most_common(1)[0][0]


def module_paths(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Return the paths of all modules that PEFT matches its targets with: saved heads are never adapted."""
    return [path for path in base_modules(model) if path and not (heads and within(path, heads))]


def _is_transposed(module: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def listed_layers(model: nn.Module, config: Mapping[str, Any], heads: Sequence[str]) -> set[str] | None:
    """Return the layers that the settings list by name, or None if they give a pattern, which is not evaluated."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    names = config.get("layers_pattern") or None
    names = [names] if isinstance(names, str) else names
    if not isinstance(targets, list) or not isinstance(excluded, list):
        return None
    if names is not None and not all(name.replace(".", "").isidentifier() for name in names):
        return None
    wanted = config.get("layers_to_transform")
    numbers = [wanted] if isinstance(wanted, int) else wanted
    found, included, left_out = set(), dotted(targets), dotted(excluded)
    for path in module_paths(model, heads):
        if not f".{path}".endswith(included) or f".{path}".endswith(left_out):
            continue
        # A target that is a whole path is adapted whatever its layer's number.
        if numbers and path not in targets and layer_number(path, names) not in numbers:
            continue
        found.add(path)
    return found
