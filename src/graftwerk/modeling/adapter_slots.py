"""What a model knows of its grafts: one record per model, one box per touched module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method
from graftwerk.modeling.active_adapters import ActiveAdapters
from graftwerk.modeling.full_weights import TrainedWeights

CHILD = "graft"
"""Name of the one child that a touched module gets; base modules never have one of that name."""
_ATTRIBUTE = "_graftwerk_record"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class AdapterSlots(nn.Module):
    """The child of a touched module: the modules of all adapters there, by adapter name, and who is active."""

    selection: ActiveAdapters

    def __init__(self, selection: ActiveAdapters) -> None:
        super().__init__()
        self.selection = selection

    def put(self, name: str, module: nn.Module) -> None:
        # Past `add_module`, which refuses names that are attributes (`training`); adapters may be called anything
        # legal.
        self._modules[name] = module

    def remove(self, name: str) -> None:
        self._modules.pop(name, None)

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

    def unmerge(self) -> None:
        """Give the base its own weights back, bit for bit."""

    def unmerged(self) -> AbstractContextManager[None]:
        """Give the base its own weights back inside a `with` block."""


class ModelAdapters:
    """All grafts of one model and who is active."""

    def __init__(self) -> None:
        self.selection = ActiveAdapters()
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
        """Make whole-weight grafts follow the selection: theirs are the only values that switching has to move."""
        fulls = [graft for graft in self.adapters.values() if graft.weights is not None]
        if not fulls:
            return
        used = self.selection.used()
        # First every one that leaves, then the one that comes: two never hold the parameters at once.
        for graft in fulls:
            if graft.name not in used:
                graft.weights.put(live=False)  # type: ignore[union-attr]
        for graft in fulls:
            if graft.name in used:
                graft.weights.put(live=True)  # type: ignore[union-attr]

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
            record = ModelAdapters()
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
