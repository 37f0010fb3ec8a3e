"""Attaching, activating and removing grafts: the verbs of the public API.

In one look:

    graft = attach(model, LoRA(r=8), name="news")
    activate(model, "news")                 activate(model, rows=["news", None, "legal"])
    with disabled(model): ...               detach(model)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.errors import ConfigError, ConflictError, ModelError, UnsupportedError
from graftwerk.inject.drawn import drawn_modules, within
from graftwerk.inject.frugal import give_back, make_frugal
from graftwerk.inject.graft import Graft
from graftwerk.inject.heads import copy_head, head_paths, open_places
from graftwerk.inject.layers import adapt, restore
from graftwerk.inject.record import Record, box_of, check_name
from graftwerk.inject.row_dims import check_rows, row_dim
from graftwerk.inject.saving import adopt
from graftwerk.inject.structure import Structure, base_parameters, forget, structure
from graftwerk.inject.targets import Anatomy, anatomy
from graftwerk.inject.weights import TrainedWeights
from graftwerk.methods.base import OFFLOAD_HOOK, Method, Place, device_of

__all__ = ["Graft", "activate", "adapter_state_dict", "attach", "detach", "disabled", "grafts"]

_WITHOUT_LAYERS = ("attention", "embedding")
"""Kinds of methods that do not work inside single layers; each has a module of its own in this room."""


def _room(kind: str) -> Any:
    return import_module(f"graftwerk.inject.{kind}")


def attach(model: PreTrainedModel, method: Method, name: str = "default") -> Graft:
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
    return attach_with(model, method, name, None)


def attach_with(
    model: PreTrainedModel, method: Method, name: str, tensors: Mapping[str, Tensor] | None, *, trainable: bool = True
) -> Graft:
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
    known = Record.of(model)
    if known is not None:
        if name in known.grafts:
            raise ConflictError(
                f"this model has an adapter `{name}` already", mend="delete it first, or choose another name"
            )
        _refuse_while_merged(known, "attach another adapter")
        if any(graft.weights is not None and graft.weights.other is None for graft in known.grafts.values()):
            raise UnsupportedError(
                "this model was fine-tuned in place (keep_base=False); an adapter on it would have no base",
                mend="attach with Full(keep_base=True), or load the base again",
            )
    view, base = anatomy(model), structure(model)
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
                mend=f"save `{path.rpartition('.')[0]}`, which reads it",
            )
    whole = False
    if method.kind == "layer":
        places = open_places(method, view, heads)
        if not places and not heads:
            raise UnsupportedError(
                f"{method.title} trains the task head alone, and {type(model).__name__} has none",
                mend="load the model with a task head, for instance AutoModelForSequenceClassification",
            )
        if not places and tensors is None and method.places(view.places):
            raise ConfigError(
                "every layer that the method would adapt lies in a module of modules_to_save, which is trained whole",
                where="method.modules_to_save",
                mend="save fewer modules, target other layers, or use the method `probe` to train saved modules alone",
            )
        modules = [base.modules[place.path] for place in places]
        around = None
        if tensors is not None:
            inner = {key: tensor for key, tensor in tensors.items() if not within(key, heads)} if heads else tensors
            around = method.around(places, modules, inner, trainable)
        whole = around is not None and bool(places)
        hosts: dict[str, nn.Module] = dict(method.assemble(places, modules) if around is None else around)
    elif method.kind == "weights":
        places, hosts = [], {}
    else:
        _refuse_soft_in_saved(method, view, heads)
        places, hosts = [], _room(method.kind).modules(model, method, view)
    # Nothing can fail from here on but stored tensors that do not fit, so that a refused method leaves the model as it
    # was.
    record = Record.make(model)
    names, rows = record.selection.names, record.selection.rows
    if known is None:
        record.remember(base.parameters)
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


_FOREIGN = ("peft.", "loralib.", "adapters.methods.")


def _refuse_foreign(model: PreTrainedModel) -> None:
    """Raise UnsupportedError if another library has put adapter layers into the model.

    Theirs would be taken for layers of the base: trained, merged and fingerprinted with it.
    """
    path = structure(model).kept("foreign", lambda: _foreign(model))
    if path is not None:
        cls = type(structure(model).modules[path])
        raise UnsupportedError(
            f"this model already has adapter layers of another library ({cls.__module__}.{cls.__name__}), which would "
            f"be taken for the base's own",
            where=path,
            mend="load the base without them and their adapter with `graftwerk.load`, or merge them first (PEFT's "
            "`merge_and_unload`)",
        )


def _foreign(model: PreTrainedModel) -> str | None:
    for path, module in structure(model).modules.items():
        if any(f"{cls.__module__}.".startswith(_FOREIGN) for cls in type(module).__mro__):
            return path
    return None


def _refuse_soft_in_saved(method: Method, view: Anatomy, heads: Sequence[str]) -> None:
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
            mend="save smaller modules (a head, an embedding), or use lora",
        )


def _install(
    model: PreTrainedModel,
    record: Record,
    method: Method,
    name: str,
    view: Anatomy,
    base: Structure,
    places: list[Place],
    hosts: Mapping[str, nn.Module],
    heads: tuple[str, ...],
    placed: bool,
) -> Graft:
    """``placed``: the hosts' modules are on their devices and in their modes already."""
    weights = None
    if method.kind == "weights":
        record.selection.choose(())
        record.settle()  # so that what is kept is the base, not another full graft
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
            record.box(host).put(name, module)
        else:
            _place(record, host, name, module)
        if (place := view.by_path.get(path)) is not None:
            record.box(host).row_dim = row_dim(view.model_type, path)
            adapt(host, record.box(host), weight_only=place.weight_only)
    for path in heads:
        host = base.modules[path]
        _place(record, host, name, copy_head(host))
        adapt(host, record.box(host), head=True)
    if method.kind in _WITHOUT_LAYERS:
        _room(method.kind).engage(model, record)
    graft = Graft(name, method, model, record, tuple(places), tuple(hosts), heads, view, weights)
    record.grafts[name] = graft
    if len(record.grafts) == 1:
        make_frugal(base.modules.values())
        adopt(model)
    activate(model, name)
    return graft


def _place(record: Record, host: nn.Module, name: str, module: nn.Module) -> None:
    """Put an adapter's module beside the weights it works with, in the host's mode."""
    device = device_of(host)
    if any(parameter.device != device for parameter in module.parameters()):
        module.to(device)
    if module.training != host.training:
        module.train(host.training)
    record.box(host).put(name, module)


def grafts(model: nn.Module) -> dict[str, Graft]:
    """All grafts on a model, by name; empty where there is none."""
    record = Record.of(model)
    return {} if record is None else dict(record.grafts)


def activate(
    model: nn.Module, name: str | Sequence[str] | None = None, *, rows: Sequence[str | None] | None = None
) -> None:
    """Choose who is active: one adapter, several in order, none, or one (or none) for each row of the next batches.

    Args:
        name: An adapter's name, a list of names that apply one after the other, or None for the bare base.
        rows: For each row of a batch a name, or None for the bare base. Stays in force until the next call.

    Raises:
        ConfigError: no such adapter; the names there are are listed.
        UnsupportedError: a kind of adapter that cannot differ by row.
        ConflictError: an adapter is merged into the base.
    """
    record = Record.of(model)
    if record is None:
        if name is None and rows is None:
            return
        raise ConfigError("this model has no adapters", mend="attach or load one first")
    if rows is not None and name is not None:
        raise ConfigError("give one name for all rows, or rows, not both")
    chosen = list(rows) if rows is not None else ([name] if isinstance(name, str) else list(name or ()))
    for one in chosen:
        if one is not None and one not in record.grafts:
            raise ConfigError(
                f"there is no adapter `{one}` on this model", mend=f"there are: {', '.join(record.grafts) or 'none'}"
            )
    if rows is not None:
        if not rows:
            raise ConfigError("rows is empty", where="activate(model, rows=...)")
        for one in dict.fromkeys(chosen):
            if one is not None and not record.grafts[one].method.rows:
                raise UnsupportedError(
                    f"`{one}` is {record.grafts[one].method.title}: it replaces the base's weights, so it cannot "
                    f"differ by row",
                    mend="run its rows in a batch of their own",
                )
        check_rows(model, [record.grafts[one] for one in dict.fromkeys(chosen) if one is not None])
        _refuse_while_merged(record, "choose adapters by row")
        record.selection.choose_rows(tuple(rows))
    else:
        if set(record.selection.merged) - {one for one in chosen if one}:
            _refuse_while_merged(record, "switch adapters")
        record.selection.choose(tuple(one for one in chosen if one is not None))
    record.settle()


def _refuse_while_merged(record: Record, wish: str) -> None:
    if record.selection.merged:
        raise ConflictError(
            f"cannot {wish}: `{', '.join(sorted(record.selection.merged))}` is merged into the base",
            mend="unmerge it first",
        )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block: no adapter, no head of an adapter; merged weights are taken out and put back.

    Raises:
        UnsupportedError: an adapter was merged with ``keep_base=False``.
    """
    record = Record.of(model)
    if record is None:
        yield
        return
    with record.bare():
        yield


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take every graft off: classes, parameters, flags, hooks and configuration are those from before.

    Raises:
        UnsupportedError: the base's weights are gone: full fine-tuning ran, or an adapter was merged, with
            ``keep_base=False``.
    """
    record = Record.of(model)
    if record is None:
        return model
    for graft in record.grafts.values():
        graft.unmerge()  # before anything is taken off: it may not be possible
    for name in list(record.grafts):
        remove(model, name)
    record.restore_flags(base_parameters(model))
    Record.forget(model)
    forget(model)
    return model


def remove(model: PreTrainedModel, name: str) -> None:
    """Delete one adapter; modules that no adapter touches any more get their own class back."""
    record = Record.of(model)
    if record is None or name not in record.grafts:
        raise ConfigError(f"there is no adapter `{name}` on this model")
    graft = record.grafts[name]
    graft.unmerge()
    if graft.weights is not None:
        graft.put_weights(live=False)
        for parameter in graft.weights.parameters.values():
            parameter.requires_grad_(False)
    selection = record.selection
    if selection.rows is not None and name in selection.rows:
        selection.choose(())
    selection.names = tuple(one for one in selection.names if one != name)
    del record.grafts[name]
    base = structure(model)
    for path in dict.fromkeys((*graft.hosts, *graft.heads)):
        host = base.modules[path]
        box = box_of(host)
        assert box is not None
        box.take(name)
        if box.empty:
            restore(host)
            make_frugal([host])
    if not record.grafts:
        give_back(base.modules.values())
    kind = graft.method.kind
    if kind in _WITHOUT_LAYERS and not any(other.method.kind == kind for other in record.grafts.values()):
        _room(kind).release(model, record)
    record.settle()


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter, its head included, keyed by module path; for those who store things themselves."""
    found = grafts(model)
    if name not in found:
        raise ConfigError(
            f"there is no adapter `{name}` on this model", mend=f"there are: {', '.join(found) or 'none'}"
        )
    return found[name].state_dict()
