"""Notes on the living activations of one model: a table beside the tensors, not attributes on them.

The query, key and value projections of an attention are called one by one with the same tensor, and nothing else tells
them that they share it. Two things are noted for a tensor:

* a `Recompute`: how it was made from tensors that backward stores anyway (a norm's input, the two halves of a gated
  product). A layer that needs the tensor in backward stores the inputs of the recipe, and recomputes it.
* a `SharedInput`: a place in backward for results that all readers of the tensor need.

Neither holds anything of the graph, so that there are no cycles; a layer's node stores only `Recompute.compute` and the
`SharedInput`, and its tensors by `save_for_backward`, so that gradient checkpointing and hooks on saved tensors see
them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from graftwerk.kernels import flags
from graftwerk.methods.base_weights import is_plain

RECENT = 4
"""Number of recipes that hold at a time. A tensor is read right after it is made, and one that lives on (a layer's
output, stored by gradient checkpointing) must not keep alive what it was made from."""

Note = TypeVar("Note")


class Recompute:
    """A recipe for computing a tensor again.

    Attributes:
        compute: Called in backward, without gradients, with the inputs; returns a tensor equal to the one it is for.
        inputs: Tensors, any shape, that backward stores for other reasons.
        version: The tensor's version when it was made; after a change in place the recipe no longer holds.
        region: The hooks on saved tensors that were in force then.
    """

    __slots__ = ("__weakref__", "compute", "inputs", "region", "version")

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], version: int) -> None:
        self.compute, self.inputs, self.version = compute, inputs, version
        self.region = _region()


class SharedInput:
    """Results shared by the readers of one tensor. ``readers`` counts the layers whose backward is to come."""

    __slots__ = ("_done", "_made", "readers")

    def __init__(self) -> None:
        self.readers = 0
        self._done = 0
        self._made: dict[Any, Tensor] = {}

    def made(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return the tensor (any shape) of a key: the first reader computes it, the others find it."""
        if self.readers < 2:
            return compute()
        if key not in self._made:
            self._made[key] = compute()
        return self._made[key]

    def register(self) -> None:
        """Count one more reader. The readers of a pass repeated inside backward are counted already."""
        if torch._C._current_graph_task_id() == -1:
            self.readers += 1

    def leave(self) -> None:
        """Note that a reader's backward is done; after the last, drop the shared results."""
        self._done += 1
        if self._done >= self.readers:
            self._done = 0
            self._made.clear()


class ActivationTable(threading.local):
    """The notes on the living activations of one model, by tensor; each thread (a replica's, say) has its own.

    Example:
        >>> table, x = ActivationTable(), torch.zeros(2)
        >>> table.shared(x) is table.shared(x)
        True
    """

    def __init__(self) -> None:
        self._shared: dict[int, tuple[ref[Tensor], SharedInput]] = {}
        self._recipes: dict[int, tuple[ref[Tensor], Recompute]] = {}
        self._recent: deque[ref[Recompute]] = deque()  # weak: a recipe lives as long as its tensor

    def __reduce__(self) -> tuple[type[ActivationTable], tuple[()]]:
        return ActivationTable, ()  # a copy of a model has activations of its own

    def shared(self, x: Tensor) -> SharedInput:
        """Return the shared results of the readers of ``x`` (any shape), created when missing."""
        found = _noted(self._shared, x)
        return _note(self._shared, x, SharedInput()) if found is None else found

    def remember(self, y: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Note how ``y`` is computed from ``inputs``, and return it; nothing is noted if no backward will come.

        Args:
            y: The result, any shape.
            compute: Computes it from the inputs.
            *inputs: Tensors that backward stores anyway.
        """
        if is_eager(y) and y.requires_grad and all(y is not one for one in inputs):
            recipe = Recompute(compute, tuple(one.detach() for one in inputs), y._version)
            self._recent.append(ref(recipe))
            if len(self._recent) > RECENT and (old := self._recent.popleft()()) is not None:
                old.inputs = ()
            _note(self._recipes, y, recipe)
        return y

    def recipe(self, x: Tensor) -> Recompute | None:
        """Return the recipe of ``x`` (any shape), or None if there is none or ``x`` was changed since."""
        found = _noted(self._recipes, x)
        if found is None or not found.inputs or found.version != x._version or not flags.enabled("lean"):
            return None
        here, there = _region(), found.region
        same = here is None if there is None else here is not None and here() is there()
        return found if same else None


def _noted(notes: dict[int, tuple[ref[Tensor], Note]], x: Tensor) -> Note | None:
    found = notes.get(id(x))
    return found[1] if found is not None and found[0]() is x else None


def _note(notes: dict[int, tuple[ref[Tensor], Note]], x: Tensor, note: Note) -> Note:
    key = id(x)

    def forget(dead: ref[Tensor]) -> None:
        if (found := notes.get(key)) is not None and found[0] is dead:
            del notes[key]

    notes[key] = (ref(x, forget), note)
    return note


def _region() -> ref[Any] | None:
    """Return the hooks on saved tensors in force, weakly.

    Gradient checkpointing installs its own around each of its regions; there a tensor from outside must be treated
    alike when the region runs again, whatever is noted about it: it never has a recipe.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else ref(hooks[1])


def is_eager(x: Tensor) -> bool:
    """Return True if kernels with an own backward may run on ``x`` (any shape): plain, eager, with gradients."""
    return flags.enabled("lean") and not torch.compiler.is_compiling() and torch.is_grad_enabled() and is_plain(x)
