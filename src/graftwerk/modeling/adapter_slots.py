"""What a model knows of its grafts: one record per model, one box per touched module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method, TargetModule
from graftwerk.modeling.active_adapters import ActiveAdapters
from graftwerk.modeling.full_weights import TrainedWeights
from graftwerk.modeling.labels import LabelNames

CHILD = "graft"
"""Name of the one child that a touched module gets; base modules never have one of that name."""
_ATTRIBUTE = "_graftwerk_record"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class AdapterSlots(nn.Module):
    """The child of a touched module: the modules of all adapters there, by adapter name, and who is active."""

    selection: ActiveAdapters
    row_dim: int
    """The dimension of the module's input and output that holds the rows of a batch."""

    def __init__(self, selection: ActiveAdapters, row_dim: int = 0) -> None:
        super().__init__()
        self.selection, self.row_dim = selection, row_dim

    def put(self, name: str, module: nn.Module) -> None:
        # Past `add_module`, which refuses names that are attributes (`training`); adapters may be called anything
        # legal.
        self._modules[name] = module

    def remove(self, name: str) -> None:
        self._modules.pop(name, None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield nothing, so that accelerate offloads the base alone.

        It descends by this method, replaces the parameters that it finds, and loads them before a module's `forward`,
        which is not how adapters are called. An adapter is small and may train: its parameters stay the objects that
        they are, where they are. What goes by `children` (`to`, `train`, hooks that only place) reaches them.
        """
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        yield from dict.fromkeys(module for module in self._modules.values() if module is not None)

    def get(self, name: str | None) -> nn.Module | None:
        return None if name is None else self._modules.get(name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.selection.clear_cache()  # after `load_state_dict(..., assign=True)` the parameters are other objects
        super()._load_from_state_dict(*args, **kwargs)

    def active(self) -> list[Any]:
        """The modules of the selected adapters that are here, in order; only where all rows use the same ones."""
        modules, merged = self._modules, self.selection.merged
        return [
            module for name in self.selection.names if name not in merged and (module := modules.get(name)) is not None
        ]

    @property
    def empty(self) -> bool:
        return not self._modules


class AttachedAdapter(Protocol):
    """The side of an adapter's handle that this room's lower files see: where it sits, and its weights."""

    name: str
    method: Method
    weights: TrainedWeights | None
    hosts: tuple[str, ...]
    heads: tuple[str, ...]
    targets: tuple[TargetModule, ...]
    labels: tuple[str, ...] | None

    @property
    def answers(self) -> bool:
        """Whether the classes that the model names are its own: it has a head, or all weights."""

    def put_weights(self, *, live: bool) -> None:
        """Make the model hold the values that were trained in place, or the base's."""

    def save(self, folder: str | Path, **metadata: Any) -> Path:
        """Write the adapter folder, whole or not at all."""

    def unmerge(self) -> None:
        """Give the base its own weights back, bit for bit."""

    def unmerged(self) -> AbstractContextManager[None]:
        """Give the base its own weights back inside a `with` block."""


class ModelAdapters:
    """All grafts of one model and who is active."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.selection = ActiveAdapters()
        self.labels = LabelNames()
        self.adapters: dict[str, AttachedAdapter] = {}
        self.flags: dict[str, bool] = {}
        """Which parameters required gradients before the first graft, by name."""

    def save_flags(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which of the base's parameters required gradients before the first graft froze the base."""
        self.flags = {name: parameter.requires_grad for name, parameter in parameters.items()}

    def restore_flags(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.requires_grad_(self.flags.get(name, True))

    def drop_missing(self) -> None:
        """Choose none of the adapters that are no longer there."""
        selection = self.selection
        if any(name is not None and name not in self.adapters for name in selection.rows or ()):
            selection.choose(())
        selection.names = tuple(name for name in selection.names if name in self.adapters)

    def sync(self) -> None:
        """Make label names and whole-weight grafts follow the selection: switching moves no other values."""
        self.labels.show(self.model, self._answering_labels())
        fulls = [graft for graft in self.adapters.values() if graft.weights is not None]
        if not fulls:
            return
        used = self.selection.used()
        # First every one that leaves, then the one that comes: two never hold the parameters at once.
        for graft in fulls:
            if graft.name not in used:
                graft.put_weights(live=False)
        for graft in fulls:
            if graft.name in used:
                graft.put_weights(live=True)

    def _answering_labels(self) -> tuple[str, ...] | None:
        """Return the label names of the adapter whose head answers, or None for the base's (also if rows differ)."""
        if self.selection.rows is not None:
            found = {None if name is None else self.adapters[name].labels for name in self.selection.rows}
            return found.pop() if len(found) == 1 else None
        for name in reversed(self.selection.names):
            if name in self.adapters and self.adapters[name].answers:
                return self.adapters[name].labels
        return None

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Use no adapter inside the block, as `attach.disabled` says."""
        with ExitStack() as stack:
            for name in self.selection.merged:
                stack.enter_context(self.adapters[name].unmerged())
            stack.callback(self.sync)
            stack.callback(self.drop_missing)
            stack.enter_context(self.selection.disabled())
            self.sync()
            yield

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters | None:
        record = model.__dict__.get(_ATTRIBUTE)
        assert record is None or isinstance(record, ModelAdapters)
        return record

    @staticmethod
    def make(model: nn.Module) -> ModelAdapters:
        """The model's record, created at the first graft."""
        record = ModelAdapters.of(model)
        if record is None:
            record = ModelAdapters(model)
            model.__dict__[_ATTRIBUTE] = record
        return record

    @staticmethod
    def forget(model: nn.Module) -> None:
        model.__dict__.pop(_ATTRIBUTE, None)

    def slots(self, module: nn.Module) -> AdapterSlots:
        """The box of a module, created when missing."""
        box = module._modules.get(CHILD)
        if box is None:
            box = AdapterSlots(self.selection)
            module._modules[CHILD] = box
        assert isinstance(box, AdapterSlots)
        return box


def slots_of(module: nn.Module) -> AdapterSlots | None:
    box = module._modules.get(CHILD)
    return box if isinstance(box, AdapterSlots) else None


def check_name(name: str) -> str:
    """An adapter's name: letters, digits, `_` and `-`, at most 64.

    Raises:
        ConfigError: anything else; names become parts of paths and parameter names.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = ascii(name)[:80]
        raise ConfigError(
            f"{shown} cannot be an adapter's name",
            hint="use at most 64 letters, digits, `_` or `-`, beginning with a letter or digit",
        )
    return name
