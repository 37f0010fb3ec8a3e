"""Training mode of a model, and the types it computes in and is loaded in; the mode is restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.inference import without_cache
from graftwerk.methods.placement import is_dispatched
from graftwerk.models.hardware import TYPES, compute_type, frozen_dtype
from graftwerk.models.quantization import require_bitsandbytes
from graftwerk.tasks.regression import Regression

if TYPE_CHECKING:
    from graftwerk.training.distributed import Distributed


def agree_on_types(settings: RunConfig, processes: Distributed) -> tuple[torch.dtype, torch.dtype]:
    """Return the type that forward passes compute in, and that of the base's weights: the same for all processes.

    Args:
        settings: Settings of the run.
        processes: Processes that train together. Each tries for itself what is fast; the main one decides.

    Raises:
        UnsupportedError: The device does not compute in this type.
    """
    types = list(TYPES.values())
    dtype = types[processes.broadcast(types.index(compute_type(settings.compute_type, processes.device)))]
    check_compute_type(dtype, processes.device)
    return dtype, base_dtype(settings, dtype, processes.device)


def check_compute_type(dtype: torch.dtype, device: torch.device) -> None:
    """Raise for a type that the device cannot train in.

    Raises:
        UnsupportedError: float16 on a CPU, which cannot scale its gradients.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise UnsupportedError("float16 needs an accelerator", where="training.compute_type", hint="auto, or bfloat16")


def base_dtype(settings: RunConfig, compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that the base's weights are loaded in.

    Raises:
        ConfigError: Weights of 16 bits would be multiplied in another type.
        UnsupportedError: The run needs weights of 32 bits, or layers would multiply in a type that the device lacks.
        ResourceError: The base is to be quantized, and bitsandbytes is not installed.
    """
    if settings.quantization is not None:
        require_bitsandbytes()
        if settings.quantization.compute_type == "float16" and device.type == "cpu":
            raise UnsupportedError(
                "float16 needs an accelerator", where="quantization.compute_type", hint="auto, or bfloat16"
            )
    wide = None
    if settings.method.kind == "weights":
        wide = f"{settings.method.title} trains the base's own weights, and small steps are lost in the rounding of"
    elif isinstance(settings.task, Regression):
        wide = "the numbers that a regression answers would be rounded to the two or three digits of"
    if settings.model_dtype == "auto":
        return frozen_dtype(compute, device) if wide is None else torch.float32
    dtype = TYPES[settings.model_dtype]
    if dtype != torch.float32 and wide is not None:
        raise UnsupportedError(f"{wide} {settings.model_dtype}", where="model_dtype", hint="auto, or float32")
    if dtype not in (torch.float32, compute):
        raise ConfigError(
            f"weights in {settings.model_dtype} are multiplied in that type, and `training.compute_type` is "
            f"{str(compute).removeprefix('torch.')}",
            where="model_dtype",
            hint="leave training.compute_type out, or model_dtype: auto",
        )
    return dtype


def check_placement(model: Any, processes: int) -> None:
    """Raise for a model that accelerate has spread over devices, if several processes would train it.

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

    Recomputing is non-reentrant. The reentrant kind gives no gradient to adapters behind a frozen embedding, unless its
    output requires gradients; transformers sees to that with a hook, which here would have frozen layers below the
    lowest adapter recomputed and propagated through, and which cuts a compiled graph. So it is taken away.

    Args:
        model: The model.
        checkpointing: Recompute activations in backward.

    Raises:
        UnsupportedError: The model cannot recompute activations.
    """
    check_checkpointing(model, checkpointing)
    was_training = model.training
    model.train()
    if checkpointing:
        callers = getattr(model, "_require_grads_hooks", None)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.disable_input_require_grads()
        if callers:
            model._require_grads_hooks = callers  # so that the caller can still remove them
    try:
        with without_cache(model):
            yield
    finally:
        if checkpointing:
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.train(was_training)
