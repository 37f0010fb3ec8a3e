"""Processes that sum their gradients: forked ones divide the rows of each step on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import nn

from graftwerk.training.distributed.accelerate import AccelerateProcesses


class SummedGradients(AccelerateProcesses):
    """Abstract: processes that sum their gradients after the last micro-batch, where DDP averages them in backward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grad_scale = 1  # gradients are summed, not averaged

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients (...) over processes; a parameter without a gradient on every process keeps None.

        One all-reduce per dtype: adapters are small, so that overlapping communication with the backward pass would
        gain nothing.
        """
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            present = group[0].new_tensor([p.grad is not None for p in group])  # (P,)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([present, *(grad.reshape(-1) for grad in grads)])  # (P + elements,)
            torch.distributed.all_reduce(flat)
            present, *sums = torch.split(flat, [len(group), *(p.numel() for p in group)])
            for parameter, total, anywhere in zip(group, sums, present.tolist(), strict=True):
                parameter.grad = total.view_as(parameter) if anywhere else None


class ForkedProcesses(SummedGradients):
    """Train together with the workers of `forked_workers`; they meet as launched processes do, through accelerate."""

    shares_rows = True

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def total_bytes(self, own: int | None) -> int | None:
        if own is None:  # None on one is None on all: it is the system that does not tell
            return None
        return int(self.sum(torch.tensor(own, dtype=torch.float64, device=self.device)).item())
