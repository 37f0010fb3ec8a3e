"""Attaching, activating and removing grafts: the verbs of the public API.

In one look:

    graft = attach(model, LoRA(r=8), name="news")
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
from graftwerk.modeling.activate import activate, disabled, refuse_while_merged
from graftwerk.modeling.adapted_module import adapt, make_memory_efficient
from graftwerk.modeling.adapter import Adapter
from graftwerk.modeling.adapter_slots import ModelAdapters, check_name
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.detach import HOOKED, detach
from graftwerk.modeling.drawn import drawn_modules, within
from graftwerk.modeling.full_weights import TrainedWeights
from graftwerk.modeling.module_index import ModuleIndex, module_index
from graftwerk.modeling.row_dims import row_dim
from graftwerk.modeling.saving import adopt
from graftwerk.modeling.task_heads import copy_head, head_paths, open_places

__all__ = ["Adapter", "activate", "adapter_state_dict", "adapters", "attach", "detach", "disabled"]


def attach(model: PreTrainedModel, method: Method, name: str = "default") -> Adapter:
    """Put a method into a model, in place, and make it the active one.

    The base is frozen; the adapter's parameters and its copy of the task head are trained, and with the head whatever
    else the checkpoint lacked (a pooler). Initial values come from torch's global random generator. Nothing of the base
    is moved, renamed or copied.

    Args:
        model: Any transformers model; it stays a plain `PreTrainedModel`.
        method: `LoRA(...)`, `Prefix(...)`, ...
        name: Letters, digits, `_`, `-`.

    Raises:
        ConflictError: the name is taken, or an adapter is merged.
        UnsupportedError: the method cannot work on this architecture; the message says why.
        ConfigError: a target or module that the settings name does not exist.
    """
    return attach_from_tensors(model, method, name, None)


def attach_from_tensors(
    model: PreTrainedModel, method: Method, name: str, tensors: Mapping[str, Tensor] | None, *, trainable: bool = True
) -> Adapter:
    """`attach`, with stored values in place of initial ones; ``tensors`` by raw key, heads included.

    Where a method can, the tensors become its parameters, without a copy; the rest is copied. The caller's mapping is
    not changed, and its tensors should not be used elsewhere.

    Raises:
        AdapterError: a tensor is missing, is not known, or has another shape.

    The model is as before whenever this raises.
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
        if any(graft.weights is not None and graft.weights.other is None for graft in known.adapters.values()):
            raise UnsupportedError(
                "this model was fine-tuned in place (keep_base=False); an adapter on it would have no base",
                hint="attach with Full(keep_base=True), or load the base again",
            )
    view, base = read_architecture(model), module_index(model)
    heads = head_paths(model, method, view)
    if tensors is None and method.kind != "weights" and (drawn := drawn_modules(model)):
        named = [path for path in heads if path in drawn or not within(path, drawn)]
        heads = (*named, *(path for path in drawn if not within(path, named)))
        if heads != tuple(named):
            method = method.model_copy(update={"modules_to_save": heads})
    for path in heads:
        if path in view.by_path and view.by_path[path].weight_only:
            raise UnsupportedError(
                f"`{path}` is never called, its weight is read: a copy of it would not be asked",
                where="method.modules_to_save",
                hint=f"save `{path.rpartition('.')[0]}`, which reads it",
            )
    whole = False
    if method.kind == "layer":
        places = open_places(method, view, heads)
        if not places and not heads:
            raise UnsupportedError(
                f"{method.title} trains the task head alone, and {type(model).__name__} has none",
                hint="load the model with a task head, for instance AutoModelForSequenceClassification",
            )
        if not places and tensors is None and method.select_targets(view.targets):
            raise ConfigError(
                "every layer that the method would adapt lies in a module of modules_to_save, which is trained whole",
                where="method.modules_to_save",
                hint="save fewer modules, target other layers, or use the method `probe` to train saved modules alone",
            )
        modules = [base.modules[place.path] for place in places]
        built = None
        if tensors is not None:
            inner = {key: tensor for key, tensor in tensors.items() if not within(key, heads)} if heads else tensors
            built = build_from_tensors(method, places, modules, inner, trainable)
        whole = built is not None and bool(places)
        hosts: dict[str, nn.Module] = dict(method.build_all(places, modules) if built is None else built)
    elif method.kind == "weights":
        places, hosts = [], {}
    else:
        _refuse_soft_in_saved(method, view, heads)
        places, hosts = [], HOOKED[method.kind].modules(model, method, view)
    # Nothing can fail from here on but stored tensors that do not fit, so that a refused method leaves the model as it
    # was.
    record = ModelAdapters.make(model)
    names, rows = record.selection.names, record.selection.rows
    if known is None:
        record.save_flags(base.parameters)
    graft = _install(model, record, method, name, view, base, places, hosts, heads, whole)
    if tensors is not None:
        try:
            graft.load_state_dict(tensors, heads_alone=whole)
        except BaseException:
            graft.delete()
            if known is None:
                detach(model)
            elif rows is not None:
                activate(model, rows=rows)
            else:
                activate(model, names)
            raise
        if not trainable:
            graft.freeze(heads_alone=whole)
    return graft


def build_from_tensors(
    method: Method,
    targets: Sequence[TargetModule],
    modules: Sequence[nn.Module],
    tensors: Mapping[str, Tensor],
    trainable: bool,
) -> dict[str, AdapterModule] | None:
    """Build the adapter modules around stored tensors, without drawing or copying any.

    Args:
        tensors: By raw key (path and parameter), the heads' left out.

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


def _refuse_soft_in_saved(method: Method, view: Architecture, heads: Sequence[str]) -> None:
    """Raise UnsupportedError if virtual tokens would go into a saved module, whose copy answers without them."""
    if method.kind == "attention":
        hosts = [place.path for place in view.attentions]
    else:
        hosts = [stack.path for stack in view.stacks if stack.kind != "decoder"]
    lost = [path for path in hosts if path and within(path, heads)]
    if lost:
        raise UnsupportedError(
            f"modules_to_save holds `{lost[0]}`, where {method.title} puts its virtual tokens",
            where="method.modules_to_save",
            hint="save smaller modules (a head, an embedding), or use lora",
        )


def _install(
    model: PreTrainedModel,
    record: ModelAdapters,
    method: Method,
    name: str,
    view: Architecture,
    base: ModuleIndex,
    places: list[TargetModule],
    hosts: Mapping[str, nn.Module],
    heads: tuple[str, ...],
    placed: bool,
) -> Adapter:
    """``placed``: the hosts' modules are on their devices and in their modes already."""
    weights = None
    if method.kind == "weights":
        record.selection.choose(())
        record.sync()  # so that what is kept is the base, not another full graft
        hooked = any(OFFLOAD_HOOK in module.__dict__ for module in base.modules.values())
        weights = TrainedWeights(base.parameters, getattr(method, "keep_base", True), record.flags, hooked=hooked)
        heads = ()
    else:
        for parameter in base.parameters.values():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
    for path, module in hosts.items():
        host = base.modules[path]
        if placed:
            record.slots(host).put(name, module)
        else:
            _place(record, host, name, module)
        if (place := view.by_path.get(path)) is not None:
            record.slots(host).row_dim = row_dim(view.model_type, path)
            adapt(host, record.slots(host), weight_only=place.weight_only)
    for path in heads:
        host = base.modules[path]
        _place(record, host, name, copy_head(host))
        adapt(host, record.slots(host), head=True)
    if method.kind in HOOKED:
        HOOKED[method.kind].install_hooks(model, record)
    graft = Adapter(name, method, model, record, tuple(places), tuple(hosts), heads, view, weights)
    record.adapters[name] = graft
    if len(record.adapters) == 1:
        make_memory_efficient(base.modules.values(), record.selection.activations)
        adopt(model)
    activate(model, name)
    return graft


def _place(record: ModelAdapters, host: nn.Module, name: str, module: nn.Module) -> None:
    """Put an adapter's module beside the weights it works with, in the host's mode."""
    device = module_device(host)
    if any(parameter.device != device for parameter in module.parameters()):
        module.to(device)
    if module.training != host.training:
        module.train(host.training)
    record.slots(host).put(name, module)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All grafts on a model, by name; empty where there is none."""
    record = ModelAdapters.of(model)
    return {} if record is None else {name: cast(Adapter, one) for name, one in record.adapters.items()}


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter, its head included, keyed by module path; for those who store things themselves."""
    found = adapters(model)
    if name not in found:
        raise ConfigError(
            f"there is no adapter `{name}` on this model", hint=f"there are: {', '.join(found) or 'none'}"
        )
    return found[name].state_dict()
