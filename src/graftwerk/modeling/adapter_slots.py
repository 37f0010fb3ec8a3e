"""The adapters of a model: one `ModelAdapters` per model, one `AdapterSlots` per adapted module."""

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
"""Name of the one child of an adapted module, part of its state dict's keys; base modules have no such child."""
_ATTRIBUTE = "_graftwerk_record"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class AdapterSlots(nn.Module):
    """The child of an adapted module: the modules of all adapters there, by adapter name, and the active ones."""

    selection: ActiveAdapters
    row_dim: int
    """The dimension of the module's input and output that holds the rows of a batch."""

    def __init__(self, selection: ActiveAdapters, row_dim: int = 0) -> None:
        super().__init__()
        self.selection, self.row_dim = selection, row_dim

    def put(self, name: str, module: nn.Module) -> None:
        """Store an adapter's module. `add_module` would refuse names that are attributes (`training`)."""
        self._modules[name] = module

    def remove(self, name: str) -> None:
        """Remove an adapter's module, if there is one."""
        self._modules.pop(name, None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield nothing, so that accelerate offloads the base alone.

        It descends by this method, replaces the parameters that it finds, and loads them before a module's `forward`,
        which is not how adapters are called. An adapter is small and may train: its parameters stay the objects that
        they are, on their device. Traversals by `children` (`to`, `train`, hooks that only place) reach them.
        """
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """Yield the adapters' modules, which `named_children` hides."""
        yield from dict.fromkeys(module for module in self._modules.values() if module is not None)

    def get(self, name: str | None) -> nn.Module | None:
        """Return an adapter's module, or None if there is none."""
        return None if name is None else self._modules.get(name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.selection.clear_cache()  # after `load_state_dict(..., assign=True)` the parameters are other objects
        super()._load_from_state_dict(*args, **kwargs)

    def active(self) -> list[Any]:
        """Return the modules of the active adapters here, in order; only if all rows use the same ones."""
        active = []
        for name in self.selection.names:  # no comprehension: torch.compile cannot trace one that assigns a name
            module = None if name in self.selection.merged else self._modules.get(name)
            if module is not None:
                active.append(module)
        return active

    @property
    def empty(self) -> bool:
        """True if no adapter has a module here."""
        return not self._modules


class AttachedAdapter(Protocol):
    """The part of an adapter's handle that the lower files of this package see."""

    name: str
    method: Method
    weights: TrainedWeights | None
    hosts: tuple[str, ...]
    heads: tuple[str, ...]
    targets: tuple[TargetModule, ...]
    labels: tuple[str, ...] | None
    answers: bool
    """True if the label names of the model are its own: it has a head, or all weights."""

    def put_weights(self, *, live: bool) -> None:
        """Make the model hold the values that were trained in place, or the base's."""

    def train_while(self, used: bool) -> None:
        """Let its own parameters require gradients only while it is used. Never called for frozen or full adapters."""

    def save(self, folder: str | Path, **metadata: Any) -> Path:
        """Write the adapter folder, whole or not at all."""

    def unmerge(self) -> None:
        """Give the base its own weights back, bit for bit."""

    def unmerged(self) -> AbstractContextManager[None]:
        """Give the base its own weights back inside a `with` block."""


class ModelAdapters:
    """All adapters of one model, and which are active."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.selection = ActiveAdapters()
        self.labels = LabelNames()
        self.adapters: dict[str, AttachedAdapter] = {}
        self.flags: dict[str, bool] = {}
        """True for each parameter that required gradients before the first adapter, by name."""
        self.full: list[str] = []
        """Names of adapters of full fine-tuning, whose weights the model's own parameters hold while active."""
        self.trainable: set[str] = set()
        """Names of adapters with parameters of their own that are not frozen for good."""
        self._training: set[str] = set()
        """Names of those whose parameters require gradients now."""
        self.packed_later: list[nn.Module] = []
        """4-bit layers that `keep_unpacked` keeps as they are, as long as there are adapters."""

    def save_flags(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which of the base's parameters (any shape) required gradients before the first adapter froze it."""
        self.flags = {name: parameter.requires_grad for name, parameter in parameters.items()}

    def restore_flags(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore the noted flags on the parameters, any shape, of the base."""
        for name, parameter in parameters.items():
            parameter.requires_grad_(self.flags.get(name, True))

    def add(self, adapter: AttachedAdapter) -> None:
        """Add an adapter whose modules are in the model."""
        self.adapters[adapter.name] = adapter
        if adapter.weights is not None:
            self.full.append(adapter.name)
        else:
            self.trainable.add(adapter.name)
            self._training.add(adapter.name)

    def discard(self, name: str) -> None:
        """Forget an adapter whose modules are about to leave the model."""
        del self.adapters[name]
        self.full = [one for one in self.full if one != name]
        self.trainable.discard(name)
        self._training.discard(name)

    def drop_missing(self) -> None:
        """Deactivate adapters that are no longer on the model."""
        selection = self.selection
        if any(name is not None and name not in self.adapters for name in selection.rows or ()):
            selection.choose(())
        selection.names = tuple(name for name in selection.names if name in self.adapters)

    def sync(self) -> None:
        """Make label names and full weights follow the active adapters: switching moves no other values."""
        self.labels.show(self.model, self._answering_labels())
        if self.full:
            used = self.selection.used()
            # Deactivate first, then activate: two never hold the parameters at once.
            for live in (False, True):
                for name in self.full:
                    if (name in used) == live:
                        self.adapters[name].put_weights(live=live)

    def train_used(self) -> None:
        """Let the chosen adapters alone require gradients: DDP waits for those of every parameter that does."""
        if self.trainable:
            used = self.trainable.intersection(self.selection.used())
            for name in self.trainable & (self._training ^ used):
                self.adapters[name].train_while(name in used)
            self._training = used

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
        """Return the adapters of a model, or None if it has none."""
        model_adapters = model.__dict__.get(_ATTRIBUTE)
        assert model_adapters is None or isinstance(model_adapters, ModelAdapters)
        return model_adapters

    @staticmethod
    def make(model: nn.Module) -> ModelAdapters:
        """Return the adapters of a model, created for the first one."""
        model_adapters = ModelAdapters.of(model)
        if model_adapters is None:
            model_adapters = ModelAdapters(model)
            model.__dict__[_ATTRIBUTE] = model_adapters
        return model_adapters

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Remove the note of adapters from a model."""
        model.__dict__.pop(_ATTRIBUTE, None)

    def slots(self, module: nn.Module) -> AdapterSlots:
        """Return the slots of a module, created when missing."""
        slots = module._modules.get(CHILD)
        if slots is None:
            slots = AdapterSlots(self.selection)
            module._modules[CHILD] = slots
        assert isinstance(slots, AdapterSlots)
        return slots


def slots_of(module: nn.Module) -> AdapterSlots | None:
    """Return the slots of a module, or None if it is not adapted."""
    slots = module._modules.get(CHILD)
    return slots if isinstance(slots, AdapterSlots) else None


def check_name(name: str) -> str:
    """Check an adapter's name: letters, digits, `_` and `-`, at most 64.

    Returns:
        The name.

    Raises:
        ConfigError: it has other characters; names become parts of paths and parameter names.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = ascii(name)[:80]
        raise ConfigError(
            f"{shown} cannot be an adapter's name",
            hint="use at most 64 letters, digits, `_` or `-`, beginning with a letter or digit",
        )
    return name
