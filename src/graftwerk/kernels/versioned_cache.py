"""One version for all tensors of a frozen adapter.

Whether an adapter has changed since it was stacked is asked in every layer of every forward pass. Asking each of its
tensors means touching some memory of each, and where the weights of a whole model stream through the caches in between,
that costs as much as the adapters' arithmetic (SmolLM2-135M, 32 adapters: 12 ms of a 105 ms step). The tensors of a
file lie in one block; as views of one tensor over it they share its version, which every write to one of them moves.

Only for parameters that do not train: autograd would take a step on one for a change of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SharedVersion:
    """A tensor over the block that an adapter was read into."""

    def __init__(self, block: Tensor) -> None:
        self.block = block

    @staticmethod
    def from_tensors(tensors: Iterable[Tensor]) -> SharedVersion | None:
        """The seal of tensors that lie in one block and have one type; None where they do not."""
        found = list(tensors)
        if not found:
            return None
        storage, dtype = found[0].untyped_storage(), found[0].dtype
        if any(one.dtype != dtype or one.untyped_storage().data_ptr() != storage.data_ptr() for one in found):
            return None
        block = torch.empty(0, dtype=dtype, device=found[0].device)
        return SharedVersion(block.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,)))

    def view(self, tensor: Tensor) -> Tensor:
        """The same values at the same place, under the block's version."""
        return self.block.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def is_valid_for(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these still lie in the block: a model that was moved or converted has others."""
        start = self.block.untyped_storage().data_ptr()
        return all(one.untyped_storage().data_ptr() == start for one in tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has tensors of its own, each with its own version."""
        return
