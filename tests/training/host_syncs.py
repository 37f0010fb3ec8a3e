"""Count the places where the host would wait for a device, on a machine that has none.

Tensors of a pretended device are marked by their storages: parameters, whatever crossed `Tensor.to(device)`, and all
that is computed from those. What was never moved is the host's, and may be read freely. A wait is

* `read`: a value of a marked tensor as a Python number (`_local_scalar_dense`, `equal`), or a copy to the host;
* `shape`: an operation whose result has as many elements as values say (`nonzero`, a mask as an index, `unique`);
* `copy`: a tensor of the host to the device, unless the copy is `non_blocking`: `torch.tensor(..., device=...)` too.

Each is put down to the innermost frame that is graftwerk's or that of a library of models.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READ = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
_SHAPE = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
          "aten::bincount"}  # fmt: skip
_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MADE = {torch.tensor, torch.as_tensor, torch.asarray}
_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
_LIBRARIES = ("/graftwerk/", "/transformers/", "/accelerate/")

Wait = tuple[str, str, str]
"""Library, kind and place."""


class Waits:
    """The waits since `counting` began.

    Attributes:
        found: Number of each wait.
    """

    def __init__(self) -> None:
        self.found: Counter[Wait] = Counter()
        self._marked: dict[int, StorageWeakRef] = {}
        self._moving = self._called = False

    def of(self, library: str, found: Counter[Wait] | None = None) -> Counter[str]:
        """Return the waits of one library, by kind and place."""
        chosen = self.found if found is None else found
        return Counter({f"{kind} {place}": n for (who, kind, place), n in chosen.items() if who == library})

    def mark(self, tensors: Iterable[Any]) -> None:
        """Say of tensors that they are on the device."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                # a weak reference keeps the address from being used again
                self._marked.setdefault(storage._cdata, StorageWeakRef(storage))

    def marked(self, tensor: Any) -> bool:
        """Return True for a tensor on the device."""
        return (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.untyped_storage()._cdata in self._marked
        )

    def wait(self, kind: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename.replace("\\", "/")
            for library in _LIBRARIES:
                if library in path and "/tests/" not in path:
                    place = f"{path.rpartition(library)[2]}:{frame.f_lineno}"
                    self.found[library.strip("/"), kind, place] += 1
                    return
            frame = frame.f_back
        self.found["elsewhere", kind, ""] += 1

    def moved(self, tensor: Tensor, *, to_host: bool) -> Tensor:
        """Return a copy on the other side."""
        self._moving = True
        try:
            copy = tensor.clone()
        finally:
            self._moving = False
        if not to_host:
            self.mark([copy])
        return copy


class _Calls(TorchFunctionMode):
    """What cannot be seen below: on a CPU a copy to the CPU is none."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.waits._called = self.waits._called, func is not Tensor.backward
        try:
            return self._called(func, args, kwargs or {})
        finally:
            self.waits._called = before

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        waits = self.waits
        if func in _HOST and waits.marked(args[0]):
            waits.wait("read")
            result = func(*args, **kwargs)
            return waits.moved(result, to_host=True) if isinstance(result, Tensor) else result
        if func is Tensor.to:
            return self._to(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.new_tensor and waits.marked(args[0]):
            waits.wait("copy")
            waits.mark([result])
        elif kwargs.get("device") not in (None, "cpu") and isinstance(result, Tensor):
            if func in _MADE and not waits.marked(args[0]):
                waits.wait("copy")
                result = waits.moved(result, to_host=False)
            waits.mark([result])
        return result

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        waits, tensor = self.waits, args[0]
        target = kwargs.get("device", args[1] if len(args) > 1 else kwargs.get("other"))
        result = func(*args, **kwargs)
        if isinstance(target, Tensor):
            to_device: bool | None = waits.marked(target)
        elif isinstance(target, str | torch.device):
            to_device = target != "cpu"  # by name it is the host, as an object the device of some tensor or model
        else:
            to_device = None
        if to_device is None or to_device == waits.marked(tensor):
            return result
        if not to_device:
            waits.wait("read")
        elif not kwargs.get("non_blocking"):
            waits.wait("copy")
        return waits.moved(result, to_host=not to_device)


def _masks(name: str, args: Any) -> bool:
    """Return True if an operation is given a mask as an index."""
    return name in _INDEX and any(index.dtype == torch.bool for index in tree_leaves(args[1]) if index is not None)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        waits = self.waits
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors and not waits._called:
            waits.mark(tree_leaves(result))  # in backward, where calls are not seen: all of it is the device's
        if waits._moving or not any(map(waits.marked, tensors)):
            return result
        name = func._schema.name
        if name == "aten::copy_":
            blocking = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
            target, source = args[:2]
            if waits.marked(source) and not waits.marked(target):
                waits.wait("read")
                return result
            if not waits.marked(source) and source.dim() and blocking:
                waits.wait("copy")
            return result
        if name in _READ:
            waits.wait("read")
        elif name in _SHAPE or func is torch.ops.aten.repeat_interleave.Tensor or _masks(name, args):
            waits.wait("shape")
        elif any(tensor.dim() and not waits.marked(tensor) for tensor in tensors):
            waits.wait("mixed")  # a device would refuse it, or copy
        waits.mark(tree_leaves(result))
        return result


@contextmanager
def counting(tensors: Iterable[Any], waits: Waits | None = None) -> Iterator[Waits]:
    """Count waits inside the block.

    Args:
        tensors: Tensors on the device.
        waits: The counts to go on with.
    """
    waits = waits or Waits()
    waits.mark(tensors)
    with _Calls(waits), _Operations(waits):
        yield waits
