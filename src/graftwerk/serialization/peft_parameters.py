"""LoRA on bare parameters (`target_parameters`) as PEFT writes it down.

PEFT wraps the module that owns the parameter, once for each of its targeted parameters, in the order in which the
module has them: the last is outermost. The keys do not name the parameter, its depth does:

    X.lora_A.weight               of the last targeted parameter of the module X
    X.base_layer.lora_A.weight    of the one before it, and so on
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.naming import endings, ends_with
from graftwerk.serialization.vocabulary import BASE_LAYER

SETTING = "target_parameters"
_PARTS = ("lora_A.weight", "lora_B.weight")


def parameter_names(architecture: Architecture, paths: Iterable[str]) -> list[str]:
    """Return few and short endings that together name exactly these parameters of a model, sorted.

    Each has the name of a module before that of the parameter: PEFT compares its own parameters too.
    """
    chosen, every = list(paths), [target.path for target in architecture.parameters]
    found = set()
    for short in endings(chosen, every):
        named = [path for path in chosen if ends_with(path, [short])]
        found.update([short] if "." in short else [".".join(path.split(".")[-2:]) for path in named])
    return sorted(found)


def stored_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return the path under which PEFT stores the update of each targeted parameter."""
    modules, hosts = base_modules(model), dict[str, set[str]]()
    for path in paths:
        host, _, name = path.rpartition(".")
        hosts.setdefault(host, set()).add(name)
    stored = {}
    for host, names in hosts.items():
        ordered = [name for name in modules[host]._parameters if name in names]
        for depth, name in enumerate(reversed(ordered)):
            stored[f"{host}.{name}"] = host + f".{BASE_LAYER}" * depth
    return stored


def split_parameters(
    model: nn.Module, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Take the updates of parameters out of an adapter's tensors.

    Args:
        model: The model.
        architecture: Its architecture.
        config: The adapter's configuration in PEFT's terms.
        tensors: By PEFT's keys, any shape.
        prefix: Prefix of the keys.

    Returns:
        By parameter and part, ``lora_A.weight`` (E r, in) and ``lora_B.weight`` (out, r E); and all other tensors.

    Raises:
        AdapterError: The settings name a parameter that the model does not have, or one that has no tensors.
        UnsupportedError: They name one that no adapter works on.
    """
    names = config.get(SETTING) or []
    chosen = {target.path: target for target in architecture.parameters if ends_with(target.path, names)}
    for name in names:
        if not any(ends_with(path, [name]) for path in chosen):
            raise AdapterError(
                f"{SETTING} names `{name[:200]}`, which is no parameter of this model",
                where="adapter_config.json",
                hint="the adapter was made for another architecture",
            )
    rest, layers = dict(tensors), dict[str, dict[str, Tensor]]()
    for path, stored in stored_paths(model, chosen).items():
        target = chosen[path]
        if target.unfit is not None:
            raise UnsupportedError(
                f"`{SETTING}` names `{path}`, on which no adapter works: {target.unfit}", where="adapter_config.json"
            )
        found = {part: rest.pop(f"{prefix}{stored}.{part}", None) for part in _PARTS}
        layers[path] = {part: tensor for part, tensor in found.items() if tensor is not None}
        missing = [f"{stored}.{part}" for part in _PARTS if part not in layers[path]]
        if missing:
            raise AdapterError(f"missing {', '.join(missing)}: {SETTING} names `{path}`")
    return layers, rest
