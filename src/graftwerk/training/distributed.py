"""One process or several: what accelerate found, and the few things that processes tell each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from graftwerk.errors import UnsupportedError
from graftwerk.tasks.base import Predictions
from graftwerk.tasks.predictions import ClassPredictions, TextPredictions


def is_main_process() -> bool:
    """As the environment says, which a launcher has set, or `helpers` for those that share a step."""
    return os.environ.get("RANK", "0") == "0"


class Distributed:
    """The processes that train together, each with a copy of the model, and this one among them.

    Args:
        shares_rows: They share the rows of one step on one machine; launched ones bring rows of their own, one device
            each.

    Precision is the loop's (autocast, scaler), so that nothing is wrapped around the model's forward and left there.

    Raises:
        UnsupportedError: launched in a way that shards the model.
    """

    def __init__(self, *, shares_rows: bool = False) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType, GradientAccumulationPlugin

        self.accelerator = Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise UnsupportedError(
                f"training with {kind.value} is not supported",
                hint="launch with plain data parallelism (accelerate launch --multi_gpu); on a processor, "
                "training.processes=N needs no launcher",
            )
        device: torch.device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device  # without a number
        self.world_size: int = self.accelerator.num_processes
        self.shares_rows = shares_rows
        self.rank: int = self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def prepare(self, model: Any) -> Any:
        """The model on this process's device, its gradients averaged over several processes that were launched."""
        return model.to(self.device) if self.shares_rows else self.accelerator.prepare_model(model)

    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        """Inside, gradients stay here: for all micro-batches of a step but the last."""
        return nullcontext() if self.world_size == 1 or self.shares_rows else self.accelerator.no_sync(model)

    @property
    def grad_scale(self) -> int:
        """What the loss is to be taken times, since gradients are averaged over so many processes."""
        return 1 if self.shares_rows else self.world_size

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Of the processes that share a step, the sum, on all; None where no process has one.

        After the last micro-batch, in one piece for each dtype: adapters are small, so that there is nothing to gain
        by hiding their way behind the backward pass.
        """
        if not self.shares_rows:
            return
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        with torch.no_grad():
            for each in by_dtype.values():
                there = torch.tensor([parameter.grad is not None for parameter in each], dtype=each[0].dtype)
                flat = torch.cat([there, *(_gradient(parameter).reshape(-1) for parameter in each)])
                torch.distributed.all_reduce(flat)
                sizes = [len(each), *(parameter.numel() for parameter in each)]
                there, *sums = torch.split(flat, sizes)
                for parameter, total, anywhere in zip(each, sums, there.tolist(), strict=True):
                    parameter.grad = total.view_as(parameter) if anywhere else None

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes."""
        if self.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) on each process to (processes, ...) on all, on the CPU. Every process has the same shape."""
        if self.world_size == 1:
            return tensor[None].cpu()
        gathered: Tensor = self.accelerator.gather(tensor[None].to(self.device))
        return gathered.cpu()

    def any(self, flag: bool) -> bool:
        """True on all if it is true on any."""
        return flag if self.world_size == 1 else self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def broadcast(self, value: int) -> int:
        """The main process's number, on all."""
        if self.world_size == 1:
            return value
        return int(self.sum(torch.tensor(value if self.is_main else 0, device=self.device)).item())

    def total_bytes(self, own: int | None) -> int | None:
        """Bytes that are held: of those that share this machine together, else this one's."""
        if own is None or not self.shares_rows:  # None on one is None on all: it is the system that does not say
            return own
        return int(self.sum(torch.tensor(own, dtype=torch.float64, device=self.device)).item())

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def shares(self, batches: Sequence[Sequence[int]]) -> list[list[int]]:
        """Deal out whole batches: the rows of each process, in the order in which it evaluates them.

        Each process takes every ``count``-th, so that a batch has the same rows however many processes there are, and
        answers round alike.
        """
        return [
            [row for batch in batches[index :: self.world_size] for row in batch] for index in range(self.world_size)
        ]

    def gather_predictions(self, own: Predictions, shares: Sequence[Sequence[int]]) -> Predictions:
        """Return the predictions of all processes on their shares, in the order of the rows.

        The loss is the mean over all.
        """
        if isinstance(own, TextPredictions):
            return self._texts_together(own, shares)
        assert isinstance(own, ClassPredictions)
        scores = self._placed(own.scores, shares)
        targets = None if own.targets is None else self._placed(own.targets, shares)
        if own.loss is None:
            return ClassPredictions(None, scores, targets)
        total, count = self.sum(torch.tensor([own.loss * own.rows, own.rows], device=self.device)).tolist()
        return ClassPredictions(total / count, scores, targets)

    def _texts_together(self, own: TextPredictions, shares: Sequence[Sequence[int]]) -> TextPredictions:
        nll, tokens = self._placed(own.nll, shares), self._placed(own.tokens, shares)
        columns: dict[str, tuple[str, ...] | None] = {}
        for name in ("texts", "references", "sources", "sets", "languages"):
            values = getattr(own, name)
            if values is None:
                columns[name] = None
                continue
            each = self._lists(list(values))
            placed = {
                row: value
                for rows, part in zip(shares, each, strict=True)
                for row, value in zip(rows, part, strict=True)
            }
            columns[name] = tuple(placed[row] for row in range(len(placed)))
        loss = None if own.loss is None else float(nll.sum() / max(int(tokens.sum()), 1))
        return TextPredictions(loss, nll, tokens, **columns)

    def _lists(self, own: list[Any]) -> list[list[Any]]:
        """Every process's list of plain values, as JSON: nothing is pickled."""
        text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor(len(text))).tolist()
        padded = torch.nn.functional.pad(text, (0, max(sizes) - len(text)))
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(self.gather(padded), sizes, strict=True)]

    def _placed(self, own: np.ndarray, shares: Sequence[Sequence[int]]) -> np.ndarray:
        """Each process's values (its rows, ...) in the places of its rows: (all rows, ...) on every process."""
        missing = max(map(len, shares)) - len(own)  # gathering needs equal shapes
        padded = np.pad(own, [(0, missing), *[(0, 0)] * (own.ndim - 1)])
        gathered = self.gather(torch.from_numpy(padded)).numpy()
        placed = np.empty((sum(map(len, shares)), *own.shape[1:]), dtype=own.dtype)
        for rows, part in zip(shares, gathered, strict=True):
            placed[list(rows)] = part[: len(rows)]
        return placed


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
