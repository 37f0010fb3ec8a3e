"""Training mode of a model, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graftwerk.errors import UnsupportedError
from graftwerk.methods.placement import is_dispatched


def check_compute_type(dtype: torch.dtype, device: torch.device) -> None:
    """Raise for a type that the device cannot train in.

    Args:
        dtype: Type that forward passes compute in.
        device: Device to train on.

    Raises:
        UnsupportedError: float16 on a CPU, which cannot scale its gradients.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise UnsupportedError("float16 needs an accelerator", where="training.compute_type", hint="auto, or bfloat16")


def check_placement(model: Any, processes: int) -> None:
    """Raise for a model that accelerate has spread over devices, if several processes would train it.

    Args:
        model: The model.
        processes: Number of processes that train together.

    Raises:
        UnsupportedError: Each process needs a copy of the model on a device of its own.
    """
    if processes > 1 and is_dispatched(model):
        raise UnsupportedError(
            f"{processes} processes cannot share a model that is spread over devices (device_map)",
            hint="train it in one process, or load a whole copy in each",
        )


def check_checkpointing(model: Any, wanted: bool) -> None:
    """Raise if a model cannot recompute activations but should.

    Args:
        model: The model.
        wanted: Value of `training.gradient_checkpointing`.

    Raises:
        UnsupportedError: The model cannot recompute activations.
    """
    if wanted and not model.supports_gradient_checkpointing:
        raise UnsupportedError(
            f"{type(model).__name__} cannot recompute activations",
            where="training.gradient_checkpointing",
            hint="set it to false",
        )


@contextmanager
def training_mode(model: Any, checkpointing: bool) -> Iterator[None]:
    """Return a context with the model in training mode, without key/value caches.

    Recomputing is non-reentrant: the reentrant kind gives no gradient to adapters behind a frozen embedding.

    Args:
        model: The model.
        checkpointing: Recompute activations in backward.

    Raises:
        UnsupportedError: The model cannot recompute activations.
    """
    check_checkpointing(model, checkpointing)
    was_training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.train()
    if use_cache:
        model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        if use_cache:
            model.config.use_cache = use_cache
        model.train(was_training)
