"""One process on its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.methods.placement import is_dispatched
from graftwerk.training.distributed.protocol import Distributed


class SingleProcess(Distributed):
    """Train alone: every collective operation is the identity."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.world_size, self.rank = device, 1, 0
        self.shares_rows, self.grad_scale = False, 1

    def prepare(self, model: nn.Module) -> nn.Module:
        return model if is_dispatched(model) else model.to(self.device)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Return without change: one process has the complete gradients (...)."""
        return

    def sum(self, values: Tensor) -> Tensor:
        return values

    def sum_scalar(self, value: float) -> float:
        return value  # not rounded to a tensor's float32

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def barrier(self) -> None:
        return None
