"""Accelerators: which one there is, torch's module of it, and telling that memory ran out from other faults."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch

_SAID_AS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",  # CUDA, HIP, XPU and MPS, and NCCL and cuDNN where they repeat what CUDA said
    "cannot allocate memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which does not say why; the shapes are torch's own
    "could not create a memory",
    "unable to mmap",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE and their likes of ROCm
    "allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "out_of_device_memory",  # SYCL and Level Zero, below XPU
    "out_of_host_memory",
    "out_of_resources",
    "invalid buffer size",  # Metal, of one tensor that is too large
)


def best_device() -> torch.device:
    """Return the accelerator of this machine, without a number, or the CPU if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu" if found is None else found.type)


def backend(device: torch.device) -> Any | None:
    """Return torch's module of an accelerator (`torch.cuda`, `torch.xpu`, `torch.mps`), or None for a CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def device_indices(device: torch.device) -> range:
    """Return the numbers of all devices of this kind: a model may lie on several."""
    module = backend(device)
    return range(module.device_count() if hasattr(module, "device_count") else 1)  # type: ignore[union-attr]


def device_names() -> list[str]:
    """Return the names of all accelerators, as their makers call them; of MPS, which has none, its own."""
    device = best_device()
    module = backend(device)
    if hasattr(module, "get_device_name"):
        return [str(module.get_device_name(index)) for index in device_indices(device)]  # type: ignore[union-attr]
    return [] if module is None else [device.type]


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until these devices have done all that they were given; a CPU has by then."""
    for device in devices:
        if (module := backend(device)) is not None:
            module.synchronize(*() if device.type == "mps" else (device,))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest type that sums can be in: float64, or float32 on MPS and on XPUs without it."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means out of memory.

    torch has a class of its own for its allocators of accelerators, and a plain RuntimeError for the CPU and for what
    libraries allocate themselves; Python has MemoryError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID_AS)


def release() -> None:
    """Give back what failed tensors held, as far as the allocators do."""
    gc.collect()
    if (module := backend(best_device())) is not None:
        module.empty_cache()
