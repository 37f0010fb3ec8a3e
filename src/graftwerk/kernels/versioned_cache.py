"""The one "has this tensor changed" cache: a value made from tensors, made again once one of them has changed.

Asking each tensor of an adapter for its version in every layer of every forward pass touches some memory of each, and
where the weights of a whole model stream through the caches in between, that costs as much as the adapters' arithmetic
(SmolLM2-135M, 32 adapters: 12 ms of a 105 ms step). The tensors of a file lie in one block; as views of one tensor over
it (`shared_block`) they share its version, which every write to one of them changes. Only for parameters that do not
train: autograd would take a step on one for a change of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
_version = attrgetter("_version")


class VersionedCache(Generic[Made]):
    """A value made from tensors: cached outside autograd, made again when one of the tensors has changed.

    Args:
        sources: Tensors, any shape, whose versions tell of changes.
        parameters: Tensors that may get gradients; while they do, nothing is cached.

    Example:
        >>> x = torch.zeros(2)
        >>> cache = VersionedCache([x], [])
        >>> cache.get(lambda: "made"), cache.get(lambda: "made again")
        ('made', 'made')
        >>> _ = x.add_(1)
        >>> cache.get(lambda: "made again")
        'made again'
    """

    def __init__(self, sources: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.sources, self.parameters = sources, parameters
        self._stamp: object = None
        self._made: Made | None = None

    def get(self, make: Callable[[], Made]) -> Made:
        """Return the value, made by ``make`` unless it is cached and still valid."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters):
            return make()
        # A model that was moved or converted has its values at other addresses: one parameter stands for all.
        stamp = version_stamp([*self.sources, *self.parameters[:1]])
        if self._made is None or stamp is None or stamp != self._stamp:
            # Not as inference tensors: the value may be used where gradients are wanted for the input.
            with torch.inference_mode(False), torch.no_grad():
                self._made, self._stamp = make(), stamp
        return self._made


def version_stamp(tensors: Sequence[Tensor]) -> object:
    """Return a value that changes with the tensors (any shape), or None if torch does not count their versions."""
    try:
        return [*map(_version, tensors), *map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # inference tensors have no version
        return None


def shared_block(tensors: Iterable[Tensor]) -> Tensor | None:
    """Return a tensor over the block that all tensors lie in, or None if they lie apart or have several dtypes.

    Args:
        tensors: Of any shape. Views of the result, as `view_in` makes them, share its version.

    Returns:
        (E,), E the elements of the block.
    """
    found = list(tensors)
    if not found:
        return None
    storage, dtype = found[0].untyped_storage(), found[0].dtype
    if any(one.dtype != dtype or one.untyped_storage().data_ptr() != storage.data_ptr() for one in found):
        return None
    block = torch.empty(0, dtype=dtype, device=found[0].device)
    return block.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def view_in(block: Tensor, tensor: Tensor) -> Tensor:
    """Return the same values at the same place (any shape), under the version of ``block`` (E,)."""
    return block.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lies_in(block: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Return True if all tensors (any shape) still lie in the block; false after a model was moved or converted."""
    start = block.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() == start for one in tensors)
