"""What layers that read the same tensor share: one dropout seed, and what backward computes again once for all of them.

Both hang on the tensor itself, as a Python attribute: the query, key and value projections of an attention are called
one by one with the same object, and nothing else tells them that they are siblings. Two things can hang there:

* a `Recompute`: how the tensor was made from tensors that backward keeps anyway (a norm's input, the two halves of a gated
  product). A layer that needs the tensor in backward keeps the recipe's inputs, and makes it again.
* a `Shared`: the seeds of dropout, and in backward a place for what the siblings would all compute again.

Neither holds anything of the graph, so that there are no cycles; a layer's node keeps only `Recompute.compute` and the
`Shared`, and its tensors by `save_for_backward`, so that gradient checkpointing and hooks on saved tensors see them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from graftwerk.kernels import flags as fast

_RECIPE, _SHARED = "_graftwerk_recipe", "_graftwerk_shared"


class Recompute:
    """How a tensor is made again.

    Attributes:
        compute: Called in backward, without gradients, with the inputs; gives a tensor equal to the one it hangs on.
        inputs: Tensors that backward keeps for other reasons.
        version: Of the tensor when it was made; changed in place since, the recipe no longer holds.
        region: The hooks on saved tensors that were in force then.
    """

    __slots__ = ("__weakref__", "compute", "inputs", "region", "version")

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], version: int) -> None:
        self.compute, self.inputs, self.version = compute, inputs, version
        self.region = _region()


class DropoutGroup:
    """Layers of one adapter that may read one tensor and then drop the same of its entries; compared by identity."""

    __slots__ = ()


class SharedInput:
    """What the readers of one tensor share. ``readers`` counts the layers whose backward is to come."""

    __slots__ = ("_drawn", "_left", "_made", "readers")

    def __init__(self) -> None:
        self.readers = 0
        self._left = 0
        self._drawn: tuple[Any, int, set[int]] | None = None
        self._made: dict[Any, Tensor] = {}

    def seed(self, siblings: Any, reader: Any) -> int:
        """The seed of the mask with which ``reader`` reads this tensor, drawn by the first of its siblings.

        A reader that comes again (a layer used twice, a forward pass repeated by gradient checkpointing) draws anew, so
        that a repeated pass, which starts from the same generator state, draws the same.
        """
        if self._drawn is None or self._drawn[0] is not siblings or id(reader) in self._drawn[2]:
            # From the CPU's generator wherever the tensor lives: the number is needed here, and nothing has to wait.
            self._drawn = (siblings, int(torch.randint(2**62, ())), set())
        self._drawn[2].add(id(reader))
        return self._drawn[1]

    def made(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that the first reader computes and the others find."""
        if self.readers < 2:
            return compute()
        if key not in self._made:
            self._made[key] = compute()
        return self._made[key]

    def register(self) -> None:
        """One more reader whose backward is to come. A pass repeated inside backward has readers known already."""
        if torch._C._current_graph_task_id() == -1:
            self.readers += 1

    def leave(self) -> None:
        """A reader's backward is done; after the last, what was made goes."""
        self._left += 1
        if self._left >= self.readers:
            self._left = 0
            self._made.clear()


_RECENT = 4
"""Recipes that hold at a time. A tensor is read right after it is made, and one that lives on (a layer's output, kept
by gradient checkpointing) must not keep alive what it was made from."""


class _Recent(threading.local):
    def __init__(self) -> None:
        self.recipes: deque[ref[Recompute]] = deque()

    def add(self, recipe: Recompute) -> None:
        self.recipes.append(ref(recipe))
        if len(self.recipes) > _RECENT and (old := self.recipes.popleft()()) is not None:
            old.inputs = ()


_recent = _Recent()


def shared_input(x: Tensor) -> SharedInput:
    """What the readers of ``x`` share, made when missing."""
    found = getattr(x, _SHARED, None)
    if found is None:
        found = SharedInput()
        setattr(x, _SHARED, found)
    assert isinstance(found, SharedInput)
    return found


def remember(y: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Hang a recipe on ``y`` and give it back; nothing where no backward will come or ``y`` is one of the inputs."""
    if possible(y) and y.requires_grad and all(y is not one for one in inputs):
        recipe = Recompute(compute, tuple(one.detach() for one in inputs), y._version)
        _recent.add(recipe)
        setattr(y, _RECIPE, recipe)
    return y


def recipe_of(x: Tensor) -> Recompute | None:
    """How ``x`` can be made again, if it is still what it was."""
    found = getattr(x, _RECIPE, None)
    if not isinstance(found, Recompute) or not found.inputs or found.version != x._version or not fast.enabled("lean"):
        return None
    here, there = _region(), found.region
    same = here is None if there is None else here is not None and here() is there()
    return found if same else None


def _region() -> ref[Any] | None:
    """The hooks on saved tensors in force. Gradient checkpointing installs its own around each of its regions; there a
    tensor from outside must be treated alike when the region runs again, whatever hangs on it: it never has a recipe.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else ref(hooks[1])


def possible(x: Tensor) -> bool:
    """Whether fast paths with a backward of their own may be taken for ``x``: a plain tensor, run eagerly."""
    return fast.enabled("lean") and not torch.compiler.is_compiling() and torch.is_grad_enabled() and type(x) is Tensor
