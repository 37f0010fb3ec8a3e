"""Processes that `accelerate launch` or torchrun started: one device each, gradients averaged by DDP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.training.distributed.protocol import Distributed

if TYPE_CHECKING:
    from accelerate import Accelerator


class AccelerateProcesses(Distributed):
    """Train together with processes that a launcher started, through accelerate.

    Args:
        accelerator: Accelerate's view of the launched processes.
        device: Device of this process.
    """

    shares_rows = False

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        # DDP averages over ranks, but the loss is already divided by the targets of all ranks: undo the average.
        self.grad_scale = self.world_size

    def prepare(self, model: Any) -> Any:
        return self.accelerator.prepare_model(model)

    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Return without change: the gradients (...) are averaged by DDP's backward hooks."""
        return  # DDP's backward hooks have done it

    def sum(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(tensor[None].to(self.device))  # (world_size, ...)
        return gathered

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()
