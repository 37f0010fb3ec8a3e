"""Accelerators that a machine without one can tell apart: CPU tensors that say they are on ``cuda:0`` or ``cuda:1``.

Inside `fake_devices` a tensor is on the device that it was moved to or made on. Values are real, so that results can be
compared with those of the plain model; tensors stay plain ones, so that fused kernels run. An operation on tensors of
two devices raises `DevicesMixedError`, as a driver would: `Tensor.to` and `copy_` are the only crossings, forward and
backward, and tensors without dimensions and indices may be the CPU's. What torch itself makes from nothing (zeros in
a backward formula) has no device until it meets a tensor that has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, META, FIRST, SECOND = (torch.device(name) for name in ("cpu", "meta", "cuda:0", "cuda:1"))

ANY = torch.device("cpu", 99)
"""In place of the device of a tensor that torch made from nothing."""
_INDEXED = {"index.Tensor", "index_put_.default", "index_put.default", "_unsafe_index.Tensor"}
_CROSSING = {"_to_copy.default", "copy_.default", "set_data.default"}


class DevicesMixedError(RuntimeError):
    """An operation had tensors of two devices."""


class _Marks:
    """The device of each storage. Weak references keep a storage's address from being used again."""

    def __init__(self) -> None:
        self.by_storage: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        if tensor.is_meta:
            return META
        marked = self.by_storage.get(tensor.untyped_storage()._cdata)
        return CPU if marked is None else marked[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            self.by_storage[storage._cdata] = StorageWeakRef(storage), device


class _Check(TorchDispatchMode):
    """Refuse operations on two devices, and put what is computed on the device of its inputs."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        placed = [tensor for tensor in given if self.marks.of(tensor) is not ANY]
        devices = {self.marks.of(tensor) for tensor in placed if tensor.dim()}
        if name in _INDEXED and self.marks.of(args[0]) != CPU:  # indices may be the CPU's
            devices -= {CPU}
        devices = devices or {self.marks.of(tensor) for tensor in placed}
        if name in _CROSSING:
            devices = {self.marks.of(args[0])} - {ANY}
        if len(devices) > 1:
            raise DevicesMixedError(f"{name} on {', '.join(sorted(map(str, devices)))}")
        made = func(*args, **kwargs)
        if devices != {META}:
            device = next(iter(devices), ANY)
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in placed):
                    self.marks.put(leaf, device)
        return made


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, marks: _Marks, device: torch.device, options: Any) -> Tensor:  # type: ignore[override]
        ctx.marks, ctx.device, ctx.dtype = marks, marks.of(tensor), tensor.dtype
        moved = tensor.to(*options[0], **{**options[1], "copy": True})
        marks.put(moved, device)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        back = grad.to(ctx.dtype, copy=True)
        ctx.marks.put(back, ctx.device)
        return back, None, None, None


class _Devices(TorchFunctionMode):
    """Let tensors say where they are, move there, and be made there."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return CPU if (device := self.marks.of(args[0])) is ANY else device
        if func == Tensor.is_cuda.__get__:
            return self.marks.of(args[0]).type == "cuda"
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, args, kwargs)
        if func is torch.device:
            return _fake(args[0]) or func(*args, **kwargs)
        asked = _fake(kwargs.get("device"))
        made = func(*args, **{**kwargs, "device": CPU} if asked else kwargs)
        if asked:
            self.marks.put(made, asked)
        elif isinstance(made, Tensor) and self.marks.of(made) is ANY:
            self.marks.put(made, CPU)
        return made

    def _to(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        asked: Any = CPU if func is Tensor.cpu else kwargs.get("device", rest[0] if rest else None)
        if isinstance(asked, Tensor):
            rest, asked = [self.marks.of(asked), asked.dtype, *rest[1:]], self.marks.of(asked)
        if asked is None or isinstance(asked, torch.dtype | bool):
            made: Tensor = Tensor.to(*args, **kwargs)
            return made
        target = _fake(asked) or torch.device(asked)
        if tensor.is_meta or target == META:
            return Tensor.to(*args, **kwargs)
        if func is not Tensor.to:
            rest, kwargs = [CPU], {}
        elif "device" in kwargs:
            kwargs = {**kwargs, "device": CPU}
        else:
            rest[0] = CPU
        if target == self.marks.of(tensor):
            made = tensor.to(*rest, **kwargs)
            self.marks.put(made, target)
            return made
        moved: Tensor = _Move.apply(tensor, self.marks, target, (rest, kwargs))
        return moved


def _fake(device: Any) -> torch.device | None:
    """Return the accelerator that is meant, None for real devices."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    if isinstance(device, str | torch.device):
        device = torch.device(device)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else None
    return None


@contextmanager
def fake_devices() -> Iterator[None]:
    """Let ``cuda:0`` and ``cuda:1`` exist inside the block, as marks on the CPU's tensors."""
    marks = _Marks()
    with _Check(marks), _Devices(marks):
        yield
