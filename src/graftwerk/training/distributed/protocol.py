"""`Distributed`: everything that the training loop asks of the processes that train together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Distributed(Protocol):
    """The processes that train together, each with a copy of the model, seen from one of them.

    Precision is the loop's business (autocast, scaler), so that nothing is wrapped around the model's forward and left
    there.

    Attributes:
        device: Device of this process.
        world_size: Number of processes.
        rank: Number of this process, from 0.
        shares_rows: True if the processes divide the rows of one step among them (forked workers); False if each
            brings rows of its own (launched processes, one device each).
        shards: True if each process holds a part of the base's weights alone.
        grad_scale: Factor on the loss of a process that makes the combined gradient a sum over processes.
    """

    device: torch.device
    world_size: int
    rank: int
    shares_rows: bool
    grad_scale: int
    shards: bool = False

    @property
    def is_main(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    @property
    def num_devices(self) -> int:
        """Number of devices that bring rows of their own to a step."""
        return 1 if self.shares_rows else self.world_size

    @property
    def processes_per_device(self) -> int:
        """Number of processes that divide the rows of one device."""
        return self.world_size if self.shares_rows else 1

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model on this process's device, ready for the forward passes of training.

        One that accelerate has spread over devices stays where it is.
        """

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which backward leaves gradients local: for every micro-batch of a step but the last."""

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over processes in place after the last micro-batch, unless backward has done so already.

        Args:
            parameters: Trained parameters (...) of any shape.
        """

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which this process has the whole base, for forward passes that not all take part in.

        All processes enter it together.
        """
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values`` (any shape) summed elementwise over processes, on every process."""

    def sum_scalar(self, value: float) -> float:
        """Return a number summed over processes, on every process."""
        return float(self.sum(torch.tensor(value, device=self.device)).item())

    def gather(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` (...) of every process as (world_size, ...) on the device; shapes must be equal."""

    def any(self, flag: bool) -> bool:
        """Return True on every process if ``flag`` is true on one of them."""
        return self.sum_scalar(float(flag)) > 0

    def broadcast(self, value: int) -> int:
        """Return the main process's number on every process."""
        return int(self.sum(torch.tensor(value if self.is_main else 0, device=self.device)).item())

    def total_bytes(self, own: int | None) -> int | None:
        """Return the bytes held by all processes of one training on this machine, None if the system does not tell."""
        return own

    def barrier(self) -> None:
        """Wait until every process has arrived here, however long one of them works alone.

        It goes before the first collective operation after such work: those give up after minutes.
        """
