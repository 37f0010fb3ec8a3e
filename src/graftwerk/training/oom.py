"""Recovery from running out of memory in training, which `devices.is_out_of_memory` detects."""

from __future__ import annotations

import math

import torch

from graftwerk.devices import backend, release
from graftwerk.errors import MemoryShortage
from graftwerk.machine import available, kilobytes
from graftwerk.training import rng
from graftwerk.training.callbacks.base import TrainingLoop
from graftwerk.training.events import Event

GIB = 2**30


def describe_memory(device: torch.device) -> str:
    """Return how much memory this process holds and how much is available, in words.

    Args:
        device: Device whose memory is described; for a CPU, the machine's.
    """
    if (module := backend(device)) is not None:
        if device.type == "mps":
            used, total = module.current_allocated_memory(), module.recommended_max_memory()
            free = max(total - module.driver_allocated_memory(), 0)
        else:
            used, (free, total) = module.memory_allocated(device), module.mem_get_info(device)
        return f"{used / GIB:.1f} GiB in use, {free / GIB:.1f} of {total / GIB:.1f} GiB free on {device}"
    held = kilobytes("/proc/self/status", "VmRSS:")
    free_bytes = available()
    if held is None or free_bytes is None:
        return "the machine does not tell how much memory is in use"
    return f"this process holds {held / 2**20:.1f} GiB, {free_bytes / GIB:.1f} GiB are available"


def out_of_memory_error(trainer: TrainingLoop, what: str) -> MemoryShortage:
    """Return the error for a training that does not fit into memory."""
    few = "training.processes=1, " if trainer.distributed.shares_rows else ""
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    return MemoryShortage(
        f"{what}: {describe_memory(trainer.device)}; rows have up to {trainer.batch_sampler.longest} tokens, "
        f"{trained:,} parameters are trained",
        hint=f"{few}training.gradient_checkpointing=true, a smaller training.per_device_train_batch_size or "
        "data.max_length, a method that trains less, or a smaller model",
        recovered=trainer.checkpoints.recoverable(),
    )


def halve_micro_batch(trainer: TrainingLoop) -> None:
    """Halve the micro-batch and double the accumulation: the same step in less memory.

    Args:
        trainer: The training, outside of the handler of the error, whose traceback holds the failed tensors.

    Raises:
        MemoryShortage: One row at a time is too much already, or other processes wait for this one's gradients.
    """
    state = trainer.state
    trainer.optimizer.zero_grad(set_to_none=True)
    release()
    if state.micro_batch == 1:
        raise out_of_memory_error(trainer, "one row at a time does not fit into memory")
    if trainer.distributed.world_size > 1:
        raise out_of_memory_error(trainer, f"micro-batches of {state.micro_batch} rows do not fit into memory")
    state.micro_batch = math.ceil(state.micro_batch / 2)
    accumulation = math.ceil(trainer.rows_per_step / state.micro_batch)
    text = (
        f"out of memory ({describe_memory(trainer.device)}): continuing with {accumulation} micro-batches of "
        f"{state.micro_batch} rows; a step still has {trainer.rows_per_step} rows"
    )
    event = Event("memory", state.step, text=text, micro_batch=state.micro_batch, accumulation=accumulation)
    with rng.untouched(trainer.device):
        trainer.emit(event)
