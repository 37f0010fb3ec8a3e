"""The gradient of one step, accumulated over micro-batches and processes.

    loss = sum over micro-batches i of (n_i / N) mean_i         mean_i over the n_i targets of micro-batch i

N is the number of targets of the whole step, on all processes, so that the result does not depend on how the step was
cut up.

Legend: P processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.evaluation.inference import autocast
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.signals import StopSignals
from graftwerk.training.step_batches import PreparedStep, StepBatches

if TYPE_CHECKING:
    from graftwerk.training.compilation import CompiledStacks


@dataclass(frozen=True)
class Gradient:
    """Summary of the gradient of one step, the same on every process; its values are still on the device.

    Attributes:
        num_targets: Number of targets, as `Objective.num_targets` counts them.
        values: (3,): mean loss over the targets of the step, norm of the gradient before clipping, and the number of a
            signal that asks to stop, 0 if no process has received one.
    """

    num_targets: float
    values: Tensor

    @property
    def finite(self) -> Tensor:
        """True if loss and norm are finite, a scalar on the device."""
        return self.values[:2].isfinite().all()

    def read(self) -> tuple[float, float, int]:
        """Return loss, norm and signal: the one wait for the device in a step."""
        loss, norm, signum = self.values.tolist()
        return loss, norm, int(signum)


@dataclass(frozen=True)
class ForwardPasses:
    """The forward passes of training, and how they run.

    Attributes:
        activation_cache: Cache that serves the frozen layers' hidden states.
        compiled: The model's layers as they are compiled, or None if they run eagerly.
        dtype: Type that they compute in; anything but float32 means autocast.
    """

    activation_cache: ActivationCache
    compiled: CompiledStacks | None
    dtype: torch.dtype

    def compiling(self) -> AbstractContextManager[Any]:
        """Return a context in which the layers run as they are compiled, for a forward and a backward pass."""
        return nullcontext() if self.compiled is None else self.compiled.active()


ExtraLosses = Callable[[PreparedStep, "GradientAccumulator"], Iterator[Tensor]]
"""Yields losses (scalars) that are added to those of a step, before the micro-batches of the step itself."""


class GradientAccumulator:
    """Compute the gradient of the mean loss over all targets of a step.

    Args:
        batches: Batches of the steps; model, task, settings and processes are theirs.
        passes: How forward passes run.
        parameters: Trained parameters (...) of any shape.
        optimizer: Optimizer whose gradients are set.
        scaler: Scaler of float16 losses.
        stop: Stop signals of this process.
    """

    def __init__(
        self,
        batches: StepBatches,
        passes: ForwardPasses,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        stop: StopSignals,
    ) -> None:
        self.batches, self.passes, self.parameters = batches, passes, parameters
        self.optimizer, self.scaler, self.stop = optimizer, scaler, stop
        self.model, self.task = batches.model, batches.task
        self.settings, self.processes = batches.settings, batches.processes
        self.extra_losses: ExtraLosses | None = None
        """Losses beside the task's own, or None."""

    def initial_micro_batch(self) -> int:
        """Return the rows of a micro-batch of this process that the settings ask for."""
        return math.ceil(self.settings.max_micro_batch_size / self.processes.processes_per_device)

    def __call__(self, rows: Sequence[int], micro_batch: int) -> Gradient:
        """Set the parameters' gradients to those of the step, clipped.

        Args:
            rows: Rows of the step, of all processes.
            micro_batch: Rows of a micro-batch.

        Returns:
            The loss, the norm before clipping and the number of targets; all 0 in a step without a target.
        """
        return self.accumulate(self.batches.take(rows, micro_batch))

    def accumulate(self, step: PreparedStep) -> Gradient:
        """Set the parameters' gradients to those of batches that are collated already."""
        processes, device, objective = self.processes, self.processes.device, self.task.objective
        total = processes.sum_scalar(float(sum(step.weights)))
        loss_sum = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        if self.extra_losses is not None:
            self._backward_extra(self.extra_losses(step, self))
        pieces = zip(step.batches, step.weights, step.examples, strict=True)
        for number, (batch, weight, examples) in enumerate(pieces, start=1):
            last = number == len(step.batches)
            syncing = nullcontext() if last else processes.no_sync(self.model)
            with self.passes.compiling(), objective.narrowed(self.model), syncing:
                with self.passes.activation_cache.serving(examples, batch), autocast(device, self.passes.dtype):
                    outputs = objective.forward(self.model, batch)
                    mean = objective.loss(outputs, batch, self.settings.label_smoothing)  # (), over the micro-batch
                    loss = mean * (weight / (total or 1.0))
                loss_sum += loss.detach()
                self._backward(loss)
        processes.all_reduce_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        if self.settings.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        signum = torch.full((), float(self.stop.signum or 0), device=device)  # a signal may reach only one process
        each = processes.gather(torch.stack([loss_sum, norm, signum]))  # (P, 3)
        return Gradient(total, torch.stack([each[:, 0].sum(), each[processes.rank, 1], each[:, 2].max()]))

    def _backward_extra(self, losses: Iterator[Tensor]) -> None:
        """Propagate losses beside the task's own; DDP sums their gradients with those of the last micro-batch."""
        with self.processes.no_sync(self.model):
            while True:
                with autocast(self.processes.device, self.passes.dtype):
                    loss = next(losses, None)
                if loss is None:
                    return
                self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * self.processes.grad_scale).backward()  # type: ignore[no-untyped-call]
