"""Attach a method to a model.

In one look:

    adapter = attach(model, LoRA(r=8), name="news")
    activate(model, "news")                 activate(model, rows=["news", None, "legal"])
    with disabled(model): ...               detach(model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError, ConflictError, ModelError, UnsupportedError
from graftwerk.kernels.versioned_cache import shared_block, view_in
from graftwerk.methods.base import OFFLOAD_HOOK, AdapterModule, Method, TargetModule, module_device
from graftwerk.methods.lora_parameters import ParameterAdapters
from graftwerk.modeling.activate import activate, disabled, refuse_while_merged
from graftwerk.modeling.adapted_module import adapt, make_memory_efficient
from graftwerk.modeling.adapter import Adapter
from graftwerk.modeling.adapter_slots import ModelAdapters, check_name
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.detach import HOOKED, detach
from graftwerk.modeling.drawn import drawn_modules, within
from graftwerk.modeling.full_weights import TrainedWeights
from graftwerk.modeling.module_index import ModuleIndex, module_index
from graftwerk.modeling.parameter_targets import by_host, refuse_two_ways
from graftwerk.modeling.row_dims import row_dim
from graftwerk.modeling.saving import adopt
from graftwerk.modeling.task_heads import copy_head, head_paths, open_targets

__all__ = ["Adapter", "activate", "adapter_state_dict", "adapters", "attach", "detach", "disabled"]


def attach(model: PreTrainedModel, method: Method, name: str = "default") -> Adapter:
    """Attach a method to a model, in place, and make it the active adapter.

    The base is frozen; the adapter's parameters and its copy of the task head are trained, and with the head whatever
    else the checkpoint lacked (a pooler). Initial values come from torch's global random generator. Nothing of the base
    is moved, renamed or copied.

    Args:
        model: Any transformers model; it stays a plain `PreTrainedModel`.
        method: `LoRA(...)`, `Prefix(...)`, ...
        name: Letters, digits, `_`, `-`.

    Returns:
        The handle of the adapter.

    Raises:
        ConflictError: the name is taken, or an adapter is merged.
        UnsupportedError: the method cannot work on this architecture; the message says why.
        ConfigError: a target or module that the settings name does not exist, or all targets are in saved modules.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> adapter = attach(model, LoRA(r=2, target_modules=["query", "value"]), name="news")
        >>> adapter.hosts
        ('bert.encoder.layer.0.attention.self.query', 'bert.encoder.layer.0.attention.self.value')
    """
    return attach_from_tensors(model, method, name, None)


def attach_from_tensors(
    model: PreTrainedModel, method: Method, name: str, tensors: Mapping[str, Tensor] | None, *, trainable: bool = True
) -> Adapter:
    """Attach a method with stored values in place of initial ones.

    If the method allows it, the tensors become its parameters, without a copy; the rest is copied. The caller's mapping
    is not changed, and its tensors should not be used elsewhere. The model is as before whenever this raises.

    Args:
        model: As for `attach`.
        method: As for `attach`.
        name: As for `attach`.
        tensors: By raw key, any shape, heads included; or None for initial values.
        trainable: True to train the adapter further.

    Raises:
        AdapterError: a tensor is missing, is not known, or has another shape.
        ConfigError: as for `attach`.
        ConflictError: the name is taken, or an adapter is merged.
        ModelError: not a transformers model.
        UnsupportedError: the method cannot work on this architecture.
    """
    check_name(name)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"attach works on transformers models, not on {type(model).__name__}")
    _refuse_foreign(model)
    known = ModelAdapters.of(model)
    if known is not None:
        if name in known.adapters:
            raise ConflictError(
                f"this model has an adapter `{name}` already", hint="delete it first, or choose another name"
            )
        refuse_while_merged(known, "attach another adapter")
        if any(adapter.weights is not None and adapter.weights.other is None for adapter in known.adapters.values()):
            raise UnsupportedError(
                "this model was fine-tuned in place (keep_base=False); an adapter on it would have no base",
                hint="attach with Full(keep_base=True), or load the base again",
            )
    architecture, base = read_architecture(model), module_index(model)
    heads = head_paths(model, method, architecture)
    if tensors is None and method.kind != "weights" and (drawn := drawn_modules(model)):
        named = [path for path in heads if path in drawn or not within(path, drawn)]
        heads = (*named, *(path for path in drawn if not within(path, named)))
        if heads != tuple(named):
            method = method.model_copy(update={"modules_to_save": heads})
    for path in heads:
        if path in architecture.by_path and architecture.by_path[path].weight_only:
            raise UnsupportedError(
                f"`{path}` is never called, its weight is read: a copy of it would not be asked",
                where="method.modules_to_save",
                hint=f"save `{path.rpartition('.')[0]}`, which reads it",
            )
    whole = False
    if method.kind == "layer":
        targets = open_targets(method, architecture, heads)
        if not targets and not heads:
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
        built = None
        if tensors is not None:
            inner = {key: tensor for key, tensor in tensors.items() if not within(key, heads)} if heads else tensors
            built = build_from_tensors(method, targets, modules, inner, trainable)
        whole = built is not None and bool(targets)
        built = method.build_all(targets, modules) if built is None else built
        hosts: dict[str, nn.Module] = dict(by_host(targets, built))
    elif method.kind == "weights":
        targets, hosts = [], {}
    else:
        _refuse_soft_in_saved(method, architecture, heads)
        targets, hosts = [], HOOKED[method.kind].modules(model, method, architecture)
    refuse_two_ways(base.modules, hosts, heads, {target.path for target in architecture.targets if target.weight_only})
    # Past this point only mismatched tensors can fail; earlier errors leave the model untouched.
    model_adapters = ModelAdapters.make(model)
    names, rows = model_adapters.selection.names, model_adapters.selection.rows
    if known is None:
        model_adapters.save_flags(base.parameters)
    adapter = _install(model, model_adapters, method, name, architecture, base, targets, hosts, heads, whole)
    if tensors is not None:
        try:
            adapter.load_state_dict(tensors, heads_alone=whole)
        except BaseException:
            adapter.delete()
            if known is None:
                detach(model)
            elif rows is not None:
                activate(model, rows=rows)
            else:
                activate(model, names)
            raise
        if not trainable:
            adapter.freeze(heads_alone=whole)
    return adapter


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
    # Values that are not of the default dtype are copied below, and so leave the block.
    block = None if trainable else shared_block(tensors.values())
    built: dict[str, AdapterModule] = {}
    for target, module in zip(targets, modules, strict=True):
        to = (module_device(module), torch.get_default_dtype())
        parameters = {
            name: nn.Parameter((tensor if block is None else view_in(block, tensor)).to(*to), trainable)
            for name, tensor in by_path[target.path].items()
        }
        if (adapter := method.build_from(target, module, parameters)) is None:
            return None
        adapter.block = block
        built[target.path] = adapter.train(module.training)
    method.connect(targets, built)
    return built


_FOREIGN = ("peft.", "loralib.", "adapters.methods.")


def _refuse_foreign(model: PreTrainedModel) -> None:
    """Raise UnsupportedError if another library has put adapter layers into the model.

    Theirs would be taken for layers of the base: trained, merged and fingerprinted with it.
    """
    path = module_index(model).cached("foreign", lambda: _foreign(model))
    if path is not None:
        cls = type(module_index(model).modules[path])
        raise UnsupportedError(
            f"this model already has adapter layers of another library ({cls.__module__}.{cls.__name__}), which would "
            f"be taken for the base's own",
            where=path,
            hint="load the base without them and their adapter with `graftwerk.load`, or merge them first (PEFT's "
            "`merge_and_unload`)",
        )


def _foreign(model: PreTrainedModel) -> str | None:
    for path, module in module_index(model).modules.items():
        if any(f"{cls.__module__}.".startswith(_FOREIGN) for cls in type(module).__mro__):
            return path
    return None


def _refuse_soft_in_saved(method: Method, architecture: Architecture, heads: Sequence[str]) -> None:
    """Raise UnsupportedError if virtual tokens would go into a saved module, whose copy computes without them."""
    if method.kind == "attention":
        hosts = [attention.path for attention in architecture.attentions]
    else:
        hosts = [stack.path for stack in architecture.stacks if stack.kind != "decoder"]
    lost = [path for path in hosts if path and within(path, heads)]
    if lost:
        raise UnsupportedError(
            f"modules_to_save holds `{lost[0]}`, where {method.title} puts its virtual tokens",
            where="method.modules_to_save",
            hint="save smaller modules (a head, an embedding), or use lora",
        )


def _install(
    model: PreTrainedModel,
    model_adapters: ModelAdapters,
    method: Method,
    name: str,
    architecture: Architecture,
    base: ModuleIndex,
    targets: list[TargetModule],
    hosts: Mapping[str, nn.Module],
    heads: tuple[str, ...],
    placed: bool,
) -> Adapter:
    """Put the built modules into the model.

    Args:
        model: The base model.
        model_adapters: Its adapters.
        method: The method.
        name: Name of the adapter.
        architecture: Structure of the base.
        base: Index of the base's own modules and parameters.
        targets: The modules that the method adapts.
        hosts: Built modules, by the path of the base module that they belong to.
        heads: Paths of modules that are trained whole.
        placed: True if the hosts' modules are on their devices and in their modes already.
    """
    weights = None
    if method.kind == "weights":
        model_adapters.selection.choose(())
        model_adapters.sync()  # so that the saved weights are the base's, not another full adapter's
        hooked = any(OFFLOAD_HOOK in module.__dict__ for module in base.modules.values())
        keep_base = getattr(method, "keep_base", True)
        weights = TrainedWeights(base.parameters, keep_base, model_adapters.flags, hooked=hooked)
        heads = ()
    else:
        for parameter in base.parameters.values():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
    by_path = {target.path: target for target in targets}
    for path, module in hosts.items():
        host = base.modules[path]
        if placed:
            model_adapters.slots(host).put(name, module)
        else:
            _place(model_adapters, host, name, module)
        target, read = by_path.get(path), isinstance(module, ParameterAdapters)
        if target is not None or read:
            model_adapters.slots(host).row_dim = row_dim(architecture.model_type, path)
            adapt(host, model_adapters.slots(host), read=read or (target is not None and target.weight_only))
    for path in heads:
        host = base.modules[path]
        _place(model_adapters, host, name, copy_head(host))
        adapt(host, model_adapters.slots(host), head=True)
    if method.kind in HOOKED:
        HOOKED[method.kind].install_hooks(model, model_adapters)
    adapter = Adapter(name, method, model, model_adapters, tuple(targets), tuple(hosts), heads, architecture, weights)
    model_adapters.adapters[name] = adapter
    if len(model_adapters.adapters) == 1:
        make_memory_efficient(base.modules.values(), model_adapters.selection.activations)
        adopt(model)
    activate(model, name)
    return adapter


def _place(model_adapters: ModelAdapters, host: nn.Module, name: str, module: nn.Module) -> None:
    """Put an adapter's module on the device of the weights it works with, in the host's mode."""
    device = module_device(host)
    if any(parameter.device != device for parameter in module.parameters()):
        module.to(device)
    if module.training != host.training:
        module.train(host.training)
    model_adapters.slots(host).put(name, module)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return all adapters on a model, by name.

    Args:
        model: Any model.

    Returns:
        Empty if the model has none.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, adapters, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> adapters(model)
        {}
        >>> _ = attach(model, LoRA(r=2), "news")
        >>> adapters(model)
        {'news': <Adapter news: LoRA on BertForSequenceClassification>}
    """
    model_adapters = ModelAdapters.of(model)
    return {} if model_adapters is None else {name: cast(Adapter, one) for name, one in model_adapters.adapters.items()}


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of one adapter, its head included, for callers that store tensors themselves.

    Args:
        model: A model with adapters.
        name: The adapter.

    Returns:
        By module path and parameter, any shape, detached; they share memory with the model.

    Raises:
        ConfigError: there is no such adapter; the message lists those on the model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, adapter_state_dict, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> _ = attach(model, LoRA(r=2, target_modules=["query"]))
        >>> for key, tensor in adapter_state_dict(model).items():
        ...     print(key, tuple(tensor.shape))
        bert.encoder.layer.0.attention.self.query.lora_A.weight (2, 8)
        bert.encoder.layer.0.attention.self.query.lora_B.weight (8, 2)
        classifier.weight (2, 8)
        classifier.bias (2,)
    """
    found = adapters(model)
    if name not in found:
        raise ConfigError(
            f"there is no adapter `{name}` on this model", hint=f"there are: {', '.join(found) or 'none'}"
        )
    return found[name].state_dict()
