"""Place of the weights of a base module: on one device, or offloaded by accelerate until the module is called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OFFLOAD_HOOK = "_hf_hook"
"""Attribute with accelerate's hook of a module, which loads offloaded weights before its forward pass."""


def adapter_dtype() -> torch.dtype:
    """Return the type of an adapter's parameters: torch's default one, and float32 where that has fewer bits."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Load the weights of a module and its children that accelerate has offloaded, inside the block."""
    parts = [part for part in module.modules() if OFFLOAD_HOOK in part.__dict__ and _is_offloaded(part)]
    for part in parts:
        part.__dict__[OFFLOAD_HOOK].pre_forward(part)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__[OFFLOAD_HOOK].post_forward(part, None)


def _is_offloaded(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def is_unloaded(module: nn.Module) -> bool:
    """Return True if a module has weights without values that nothing will load: a model on `meta`, for a dry run."""
    return _is_offloaded(module) and OFFLOAD_HOOK not in module.__dict__


def module_device(module: nn.Module) -> torch.device:
    """Return the device that a base module computes on.

    It is that of its own weights, or where accelerate loads them if they are offloaded; the CPU if there are none, or
    none have been loaded yet.
    """
    for part in itertools.chain((module,), module.modules()):  # most are linear layers, whose parts need no walk
        own = next((parameter for parameter in part._parameters.values() if parameter is not None), None)
        if own is not None:
            return _execution_device(part) if own.is_meta else own.device
    return torch.device("cpu")


def _execution_device(module: nn.Module) -> torch.device:
    for hook in placing_hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:  # 0 is the first accelerator
            return torch.device(device)
    return torch.device("cpu")


def placing_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks on a module; several are kept in one."""
    hook = module.__dict__.get(OFFLOAD_HOOK)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def is_dispatched(model: nn.Module) -> bool:
    """Return True if accelerate decides where the parts of a model are (``device_map``, offloading)."""
    return any(OFFLOAD_HOOK in part.__dict__ for part in model.modules())
