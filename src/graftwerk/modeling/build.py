"""Build what an adapter puts into a model: which modules it adapts or saves whole, and its own module at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.kernels.versioned_cache import shared_block, view_in
from graftwerk.methods.base import AdapterModule, Method, TargetModule
from graftwerk.methods.base_weights import is_coded, weight_type
from graftwerk.methods.placement import adapter_dtype, module_device
from graftwerk.modeling import prefix_install, prompt_embedding
from graftwerk.modeling.accelerate_compat import is_replaced
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import drawn_modules, within
from graftwerk.modeling.module_index import ModuleIndex
from graftwerk.modeling.parameter_targets import by_host, refuse_two_ways
from graftwerk.modeling.task_heads import head_paths, open_targets

HOOKED = MappingProxyType({"attention": prefix_install, "embedding": prompt_embedding})
"""The file that builds, hooks and unhooks each kind of method that does not work inside single layers."""


@dataclass(frozen=True)
class BuiltAdapter:
    """An adapter that is not in its model yet.

    Attributes:
        method: The settings, with the modules to save that the model decides.
        targets: The adapted modules.
        modules: Its own modules, by path of the base module that carries them.
        saved: Paths of the modules that it trains and stores whole.
        placed: True if ``modules`` are on their devices and in their modes already, their values those stored.
    """

    method: Method
    targets: tuple[TargetModule, ...]
    modules: Mapping[str, nn.Module]
    saved: tuple[str, ...]
    placed: bool = False


def build_adapter(
    model: PreTrainedModel,
    method: Method,
    architecture: Architecture,
    base: ModuleIndex,
    tensors: Mapping[str, Tensor] | None,
    *,
    trainable: bool,
) -> BuiltAdapter:
    """Build an adapter for a model, which is not changed.

    Args:
        model: The base model.
        method: The settings.
        architecture: Structure of the base.
        base: Index of the base's own modules and parameters.
        tensors: Stored values by raw key, any shape; or None for initial values.
        trainable: True to train stored values further.

    Raises:
        ConfigError: a target or module that the settings name does not exist, or is named twice.
        UnsupportedError: the method cannot work on this architecture.
    """
    method, saved = _saved_modules(model, method, architecture, new=tensors is None)
    built = BuiltAdapter(method, (), {}, saved)
    if method.kind == "layer":
        built = _build_layers(model, method, architecture, base, saved, tensors, trainable)
    elif method.kind != "weights":
        _refuse_soft_in_saved(method, architecture, saved)
        built = BuiltAdapter(method, (), HOOKED[method.kind].build_modules(model, method, architecture), saved)
    weight_only = {target.path for target in architecture.targets if target.weight_only}
    refuse_two_ways(base.modules, built.modules, saved, weight_only)
    return built


def _saved_modules(
    model: PreTrainedModel, method: Method, architecture: Architecture, *, new: bool
) -> tuple[Method, tuple[str, ...]]:
    """Return the paths of the modules that an adapter saves whole, and the settings that name them.

    A new adapter also saves what the checkpoint lacked and was drawn at random (a pooler).
    """
    saved = head_paths(model, method, architecture)
    if new and method.kind != "weights" and (drawn := drawn_modules(model)):
        named = [path for path in saved if path in drawn or not within(path, drawn)]
        saved = (*named, *(path for path in drawn if not within(path, named)))
        if saved != tuple(named):
            method = method.model_copy(update={"modules_to_save": saved})
    for path in saved:
        module = model.get_submodule(path)
        coded = next((parameter for parameter in module.parameters() if is_coded(parameter)), None)
        if method.kind != "weights" and coded is not None:
            raise UnsupportedError(
                f"`{path}` is quantized, so that no copy of it can be trained ({weight_type(coded)})",
                where="method.modules_to_save",
                hint="load the base with it in full precision (`quantization.skip` in a run file), or adapt it by lora",
            )
        replaced = next((part for part in module.modules() if is_replaced(part)), None)
        if method.kind != "weights" and replaced is not None:
            raise UnsupportedError(
                f"the forward of a {type(replaced).__name__} in `{path}` has been replaced on the object: a copy would "
                f"run the base's own",
                where="method.modules_to_save",
                hint="attach the adapter first, and wrap the model then",
            )
        if path in architecture.by_path and architecture.by_path[path].weight_only:
            raise UnsupportedError(
                f"`{path}` is only read, never called: a trained copy of it would have no effect",
                where="method.modules_to_save",
                hint=f"save `{path.rpartition('.')[0]}`, which reads it",
            )
    return method, saved


def _build_layers(
    model: PreTrainedModel,
    method: Method,
    architecture: Architecture,
    base: ModuleIndex,
    saved: tuple[str, ...],
    tensors: Mapping[str, Tensor] | None,
    trainable: bool,
) -> BuiltAdapter:
    """Build the modules of a method that works inside layers."""
    targets = open_targets(method, architecture, saved)
    if not targets and not saved:
        raise UnsupportedError(
            f"{method.title} trains the task head alone, and {type(model).__name__} has none",
            hint="load the model with a task head, for instance AutoModelForSequenceClassification",
        )
    layers = [target for target in targets if not target.is_table]
    if not layers and tensors is None and method.select_targets(architecture.candidates(method)):
        raise ConfigError(
            "every layer that the method would adapt lies in a module of modules_to_save, which is trained whole",
            where="method.modules_to_save",
            hint="save fewer modules, target other layers, or use the method `probe` to train saved modules alone",
        )
    modules = [base.modules[target.host] for target in targets]
    stored = None
    if tensors is not None:
        inner = {key: tensor for key, tensor in tensors.items() if not within(key, saved)} if saved else tensors
        stored = build_from_tensors(method, targets, modules, inner, trainable)
    built = method.build_all(targets, modules) if stored is None else stored
    hosts: dict[str, nn.Module] = dict(by_host(targets, built))
    return BuiltAdapter(method, tuple(targets), hosts, saved, placed=stored is not None and bool(targets))


def build_from_tensors(
    method: Method,
    targets: Sequence[TargetModule],
    modules: Sequence[nn.Module],
    tensors: Mapping[str, Tensor],
    trainable: bool,
) -> dict[str, AdapterModule] | None:
    """Build the adapter modules around stored tensors, without drawing or copying any.

    Args:
        method: The settings.
        targets: The adapted modules.
        modules: The base modules there, in the same order.
        tensors: By raw key (path and parameter), any shape, the heads' left out.
        trainable: True to train them further.

    Returns:
        By path, each on the device and in the mode of its base module. None if the method builds first and copies into
        what it built, or if the tensors are not exactly those it needs.
    """
    by_path: dict[str, dict[str, Tensor]] = {target.path: {} for target in targets}
    for key, tensor in tensors.items():
        path = key.rpartition(".")[0]
        while path and path not in by_path:
            path = path.rpartition(".")[0]
        if path not in by_path:
            return None
        by_path[path][key[len(path) + 1 :]] = tensor
    dtype, devices = adapter_dtype(), [module_device(module) for module in modules]
    # Moved and converted as a whole, and then viewed: one copy, and not one for each parameter.
    stored = shared_block(tensors.values()) if len(set(devices)) == 1 else None
    whole = None if stored is None else stored.to(devices[0], dtype)
    block = None if trainable else whole  # parameters that train have versions of their own

    def placed(tensor: Tensor, device: torch.device) -> Tensor:
        if whole is None or (trainable and whole is stored):
            return tensor.to(device, dtype)
        return view_in(whole.data if trainable else whole, tensor)

    built: dict[str, AdapterModule] = {}
    for target, module, device in zip(targets, modules, devices, strict=True):
        parameters = {
            name: nn.Parameter(placed(tensor, device), trainable) for name, tensor in by_path[target.path].items()
        }
        if (adapter := method.build_from(target, module, parameters)) is None:
            return None
        adapter.__dict__["block"] = block
        if adapter.training != module.training:
            _set_mode(adapter, module.training)
        built[target.path] = adapter
    method.connect(targets, built)
    return built


def _set_mode(module: nn.Module, training: bool) -> None:
    """Do as `module.train(training)`, without the checks of `nn.Module`: loading does it hundreds of times."""
    module.__dict__["training"] = training
    for part in module._modules.values():
        if part is not None:
            _set_mode(part, training)


def _refuse_soft_in_saved(method: Method, architecture: Architecture, saved: Sequence[str]) -> None:
    """Raise UnsupportedError if virtual tokens would go into a saved module, whose copy computes without them."""
    if method.kind == "attention":
        hosts = [attention.path for attention in architecture.attentions]
    else:
        hosts = [stack.path for stack in architecture.stacks if stack.kind != "decoder"]
    lost = [path for path in hosts if path and within(path, saved)]
    if lost:
        raise UnsupportedError(
            f"modules_to_save holds `{lost[0]}`, where {method.title} puts its virtual tokens",
            where="method.modules_to_save",
            hint="save smaller modules (a head, an embedding), or use lora",
        )
