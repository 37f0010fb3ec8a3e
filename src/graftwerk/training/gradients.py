"""The gradient of one step, accumulated over micro-batches and processes.

Legend: B rows of a micro-batch, T tokens of a row with padding, P processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from graftwerk.tasks.base import Task
from graftwerk.tasks.packing import pack
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.distributed import Distributed
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.signals import StopSignals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Gradient(NamedTuple):
    """Summary of the gradient of one step, the same on every process.

    Attributes:
        loss: Mean loss over the targets of the step.
        norm: Norm of the gradient before clipping.
        num_targets: Number of targets, as `Task.num_targets` counts them.
        signum: Signal that asks to stop, 0 if no process has received one.
    """

    loss: float
    norm: float
    num_targets: float
    signum: int


class GradientAccumulator:
    """Compute the gradient of the mean loss over all targets of a step.

    Args:
        model: Model as `Distributed.prepare` returned it.
        parameters: Trained parameters (...) of any shape.
        task: Task as it is trained, with class weights.
        tokenizer: Tokenizer of the model.
        rows_of: Sampler that holds the rows.
        settings: Training settings.
        optimizer: Optimizer whose gradients are set.
        scaler: Scaler of float16 losses.
        processes: Processes that train together.
        activation_cache: Cache that serves the frozen layers' hidden states.
        dtype: Type that forward passes compute in.
        max_length: Tokens of a packed row.
        stop: Stop signals of this process.
    """

    def __init__(
        self,
        model: Any,
        parameters: Sequence[torch.nn.Parameter],
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        rows_of: BatchSampler,
        settings: TrainingSettings,
        *,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        processes: Distributed,
        activation_cache: ActivationCache,
        dtype: torch.dtype,
        max_length: int,
        stop: StopSignals,
    ) -> None:
        self.model, self.parameters, self.task, self.tokenizer = model, parameters, task, tokenizer
        self.rows_of, self.settings, self.optimizer, self.scaler = rows_of, settings, optimizer, scaler
        self.processes, self.activation_cache, self.dtype = processes, activation_cache, dtype
        self.max_length, self.stop = max_length, stop

    def initial_micro_batch(self) -> int:
        """Return the rows of a micro-batch that the settings ask for."""
        rows = self.settings.per_device_train_batch_size
        if self.settings.per_device_train_tokens is not None:  # tokens bound a micro-batch, and rows only the step
            rows *= self.settings.gradient_accumulation_steps
        return math.ceil(rows / self.processes.world_size) if self.processes.shares_rows else rows

    def __call__(self, rows: Sequence[int], micro_batch: int) -> Gradient:
        """Set the parameters' gradients to those of the step, clipped.

        Micro-batches count by their number of targets, so that the result does not depend on how the step was cut up.

        Args:
            rows: Rows of the step, of all processes.
            micro_batch: Rows of a micro-batch.

        Returns:
            The loss, the norm before clipping and the number of targets; all 0 in a step without a target.
        """
        processes, device = self.processes, self.processes.device
        pieces = micro_batches(
            rows,
            self.rows_of.lengths,
            micro_batch,
            tokens=self.settings.per_device_train_tokens,
            processes=processes.world_size,
            process=processes.rank,
        )
        # A process without rows left takes part with weight zero: the others wait for its gradients.
        batches = [self._batch(piece or rows[:1]) for piece in pieces]
        objective = self.task.objective
        weights = [objective.num_targets(batch) if piece else 0 for piece, batch in zip(pieces, batches, strict=True)]
        total = processes.sum_scalar(float(sum(weights)))
        loss_sum = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (batch, weight, piece) in enumerate(zip(batches, weights, pieces, strict=True), start=1):
            with nullcontext() if number == len(batches) else processes.no_sync(self.model):
                examples = [self.rows_of.examples[row] for row in piece or rows[:1]]
                with self.activation_cache.serving(examples, batch), self._autocast():
                    outputs = objective.forward(self.model, batch)
                    mean = objective.loss(outputs, batch, self.settings.label_smoothing)  # (), over the micro-batch
                    loss = mean * (weight / (total or 1.0))
                loss_sum += loss.detach()
                self.scaler.scale(loss * processes.grad_scale).backward()  # type: ignore[no-untyped-call]
        processes.all_reduce_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        if self.settings.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        signum = torch.tensor(float(self.stop.signum or 0), device=device)  # a signal may reach only one process
        each = processes.gather(torch.stack([loss_sum, norm, signum]))  # (P, 3), the one wait for the device in a step
        return Gradient(each[:, 0].sum().item(), each[processes.rank, 1].item(), total, int(each[:, 2].max()))

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Collate rows into tensors (B, T) on the device."""
        examples = [self.rows_of.examples[row] for row in rows]
        if self.settings.packing:
            batch = pack(examples, self.tokenizer, self.max_length)
        else:
            batch = self.task.collator.collate_training(examples, self.tokenizer)
        return {name: tensor.to(self.processes.device, non_blocking=True) for name, tensor in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.processes.device.type, self.dtype)
