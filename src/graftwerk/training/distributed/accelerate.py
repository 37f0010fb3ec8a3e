"""Processes that `accelerate launch` or torchrun started: one device each, gradients averaged by DDP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from graftwerk.training.distributed.protocol import Distributed

if TYPE_CHECKING:
    from accelerate import Accelerator


PATIENCE = timedelta(days=30)
"""Longest wait of a barrier. The devices' own collectives give up after ten minutes, which is less than it may take
one process alone to fill the trunk or to write texts; over gloo, a process that dies is noticed at once."""


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
        # The group of forked processes waits as long itself.
        self._patient = None if self.shares_rows else torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def prepare(self, model: nn.Module) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Return without change: the gradients (...) are averaged by DDP's backward hooks."""
        return  # DDP's backward hooks have done it

    def sum(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        double = tensor.dtype == torch.float64  # travels as words: not every device has the type
        words = tensor.view(torch.int64) if double else tensor
        gathered: Tensor = self.accelerator.gather(words[None].to(self.device))  # (world_size, ...)
        return gathered.cpu().view(torch.float64) if double else gathered

    def barrier(self) -> None:
        torch.distributed.barrier(group=self._patient)
