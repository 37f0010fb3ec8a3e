"""Attach a method to a model.

    adapter = attach(model, LoRA(r=8), name="news")
    activate(model, "news")                 activate(model, rows=["news", None, "legal"])
    with disabled(model): ...               detach(model)

An adapter is built first, which changes nothing (`build.build_adapter`: which modules, and the method's own module at
each). Then its modules go into slots of the modules that carry them, whose class becomes `adapted_module.Adapted`:
there a forward pass finds the active adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError, ModelError
from graftwerk.methods.base import Method, Role
from graftwerk.methods.placement import adapter_dtype, is_unloaded, module_device, placing_hooks
from graftwerk.modeling.activate import activate, disabled
from graftwerk.modeling.adapted_module import adapt, make_memory_efficient
from graftwerk.modeling.adapter import Adapter
from graftwerk.modeling.adapter_slots import ModelAdapters, check_name
from graftwerk.modeling.architectures import Architecture, read_architecture
from graftwerk.modeling.attach_checks import check_attachable
from graftwerk.modeling.build import HOOKED, BuiltAdapter, build_adapter
from graftwerk.modeling.detach import detach, remove_parts
from graftwerk.modeling.full_weights import TrainedWeights, warn_of_rounding
from graftwerk.modeling.module_index import ModuleIndex, module_index
from graftwerk.modeling.quantized_layers import keep_unpacked
from graftwerk.modeling.row_dims import row_dim
from graftwerk.modeling.saving import adopt
from graftwerk.modeling.task_heads import copy_head

__all__ = ["Adapter", "activate", "adapter_state_dict", "adapters", "attach", "detach", "disabled"]


def attach(model: PreTrainedModel, method: Method, name: str = "default") -> Adapter:
    """Attach a method to a model, in place, and make it the active adapter.

    The base is frozen; the adapter trains, and with it its own copies of the task head and of modules that the
    checkpoint lacked (a pooler), all in float32. `Full` trains the base's parameters themselves, warns if they have 16
    bits, and keeps a copy of their values unless ``keep_base=False``. Initial values come from torch's global random
    generator. Nothing of the base is moved or renamed.

    Args:
        model: Any transformers model; it stays a plain `PreTrainedModel`.
        method: `LoRA(...)`, `Prefix(...)`, ...
        name: Letters, digits, `_`, `-`.

    Returns:
        The handle of the adapter.

    Raises:
        ConflictError: the name is taken, or an adapter is merged.
        ModelError: not a transformers model.
        UnsupportedError: the method cannot work on this architecture, or the model has adapter layers of another
            library, or 4-bit layers packed for inference; the message says why.
        ConfigError: a target or module that the settings name does not exist, all targets are in saved modules, or the
            initialization needs training rows (``init_lora_weights="qera"``).

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> adapter = attach(model, LoRA(r=2, target_modules=["query", "value"]), name="news")
        >>> adapter.hosts
        ('bert.encoder.layer.0.attention.self.query', 'bert.encoder.layer.0.attention.self.value')
    """
    if method.starts_from_errors:
        raise ConfigError(
            "init_lora_weights=qera needs the full weights and training rows, which attach does not have",
            where="method.init_lora_weights",
            hint="train a run with `quantization: nf4`; or attach with init_lora_weights=True",
        )
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
    check_attachable(model, ModelAdapters.of(model), name)
    architecture, base = read_architecture(model), module_index(model)
    built = build_adapter(model, method, architecture, base, tensors, trainable=trainable)
    # Past this point only memory and mismatched tensors can fail; earlier errors leave the model untouched.
    with _undone_on_error(model, name, base) as model_adapters:
        adapter = _install(model, model_adapters, name, architecture, base, built)
        if tensors is not None:
            adapter.load_state_dict(tensors, heads_alone=built.placed)
    if tensors is not None and not trainable:
        adapter.freeze(heads_alone=built.placed)
    elif adapter.weights is not None:
        warn_of_rounding(adapter.weights)
    return adapter


@contextmanager
def _undone_on_error(model: PreTrainedModel, name: str, base: ModuleIndex) -> Iterator[ModelAdapters]:
    """Yield the model's adapters; if the block raises, take the new one off and restore flags and active adapters."""
    existing, model_adapters = ModelAdapters.of(model), ModelAdapters.make(model)
    names, rows = model_adapters.selection.names, model_adapters.selection.rows
    flags = [parameter.requires_grad for parameter in base.parameters.values()]
    if existing is None:
        model_adapters.save_flags(base.parameters)
        model_adapters.packed_later = keep_unpacked(base.modules)
    try:
        yield model_adapters
    except BaseException:
        remove_parts(model, name)
        for parameter, flag in zip(base.parameters.values(), flags, strict=True):
            parameter.requires_grad_(flag)
        if existing is None:
            detach(model)
        elif rows is not None:
            activate(model, rows=rows)
        else:
            activate(model, names)
        raise


def _install(
    model: PreTrainedModel,
    model_adapters: ModelAdapters,
    name: str,
    architecture: Architecture,
    base: ModuleIndex,
    built: BuiltAdapter,
) -> Adapter:
    """Put a built adapter into the model and make it the active one."""
    method, saved, weights = built.method, built.saved, None
    if method.kind == "weights":  # all of the base trains, heads included
        saved, weights = (), _trained_weights(method, model_adapters, base)
    else:
        for parameter in base.parameters.values():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        _insert_modules(model_adapters, name, architecture, base, built)
        _insert_copies(model_adapters, name, base, saved)
    if method.kind in HOOKED:
        HOOKED[method.kind].install_hooks(model, model_adapters)
    hosts = tuple(built.modules)
    adapter = Adapter(name, method, model, model_adapters, built.targets, hosts, saved, architecture, weights)
    model_adapters.add(adapter)
    if len(model_adapters.adapters) == 1:
        make_memory_efficient(base.modules.values(), model_adapters.selection.activations)
        adopt(model)
    activate(model, name)
    return adapter


def _insert_modules(
    model_adapters: ModelAdapters, name: str, architecture: Architecture, base: ModuleIndex, built: BuiltAdapter
) -> None:
    """Put an adapter's own modules into the base modules that carry them; layers get their adapted class."""
    layers = {target.host for target in built.targets}
    read = {target.host for target in built.targets if target.weight_only or target.role is Role.PARAMETER}
    for path, module in built.modules.items():
        host = base.modules[path]
        slots = model_adapters.slots(host)
        slots.put(name, module if built.placed else _placed(module, host))
        if path in layers:  # not attentions and stacks: hooks look into their slots
            if dim := row_dim(architecture.model_type, path):
                slots.row_dim = dim
            adapt(host, slots, read=path in read)


def _insert_copies(model_adapters: ModelAdapters, name: str, base: ModuleIndex, paths: Sequence[str]) -> None:
    """Put trainable copies of the base's modules at these paths, such as the task head, into their slots."""
    for path in paths:
        host = base.modules[path]
        copy = _placed(copy_head(host), host)
        slots = model_adapters.slots(host)
        slots.put(name, copy)
        adapt(host, slots, head=True)


def _placed(module: nn.Module, host: nn.Module) -> nn.Module:
    """Return an adapter's module on the device and in the mode of the base module that carries it, never in 16 bits."""
    device = module_device(host)
    if any(parameter.dtype.itemsize < 4 for parameter in module.parameters()):
        module.to(adapter_dtype())
    if not is_unloaded(host) and any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)
    if module.training != host.training:
        module.train(host.training)
    return module


def _trained_weights(method: Method, model_adapters: ModelAdapters, base: ModuleIndex) -> TrainedWeights:
    """Return the base's own parameters, to be trained in place, with a copy of their values if the method keeps one."""
    model_adapters.selection.choose(())
    model_adapters.sync()  # so that the values that are kept are the base's, not another full adapter's
    hooked = any(placing_hooks(module) for module in base.modules.values())
    return TrainedWeights(base.parameters, getattr(method, "keep_base", True), model_adapters.flags, hooked=hooked)


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
