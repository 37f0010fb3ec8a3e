"""The gradient of one step, accumulated over micro-batches and processes.

Legend: B rows of a micro-batch, T tokens of a row with padding, P processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.devices import is_out_of_memory
from graftwerk.evaluation.inference import moved
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.packing import pack
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.distributed import Distributed
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.signals import StopSignals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
class PreparedStep:
    """The batches of a step, collated and on their way to the device.

    Attributes:
        rows: Rows of the step, of all processes.
        micro_batch: Rows of a micro-batch.
        examples: Examples of each micro-batch of this process.
        batches: Their tensors, (B, T) each.
        weights: Number of targets of each micro-batch.
        drawn: States of torch's generator before and after collating, (n,) uint8 each.
    """

    rows: Sequence[int]
    micro_batch: int
    examples: list[list[Example]]
    batches: list[dict[str, Tensor]]
    weights: list[float]
    drawn: tuple[Tensor, Tensor]


Beside = Callable[["PreparedStep", "GradientAccumulator"], Iterator[Tensor]]
"""Yields losses (scalars) that are added to those of a step, before the micro-batches of the step itself."""


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
        compiled: The model's layers as they are compiled, or None if they run eagerly.
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
        compiled: CompiledStacks | None,
        dtype: torch.dtype,
        max_length: int,
        stop: StopSignals,
    ) -> None:
        self.model, self.parameters, self.task, self.tokenizer = model, parameters, task, tokenizer
        self.rows_of, self.settings, self.optimizer, self.scaler = rows_of, settings, optimizer, scaler
        self.processes, self.activation_cache, self.dtype = processes, activation_cache, dtype
        self.compiled = compiled
        self.max_length, self.stop = max_length, stop
        self._next: PreparedStep | None = None
        self.beside: Beside | None = None
        """Losses beside the task's own, or None."""

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
        return self.of(self._prepared(rows, micro_batch))

    def of(self, step: PreparedStep) -> Gradient:
        """Set the parameters' gradients to those of batches that are collated already."""
        processes, device, objective = self.processes, self.processes.device, self.task.objective
        total = processes.sum_scalar(float(sum(step.weights)))
        loss_sum = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        if self.beside is not None:
            self._add(self.beside(step, self))
        pieces = zip(step.batches, step.weights, step.examples, strict=True)
        for number, (batch, weight, examples) in enumerate(pieces, start=1):
            last = number == len(step.batches)
            with self._compiled(), nullcontext() if last else processes.no_sync(self.model):
                with self.activation_cache.serving(examples, batch), self._autocast():
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

    def _add(self, losses: Iterator[Tensor]) -> None:
        """Propagate losses beside the task's own; DDP sums their gradients with those of the last micro-batch."""
        with self.processes.no_sync(self.model):
            while True:
                with self._autocast():
                    loss = next(losses, None)
                if loss is None:
                    return
                self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * self.processes.grad_scale).backward()  # type: ignore[no-untyped-call]

    def prefetch(self, rows: Sequence[int], micro_batch: int) -> None:
        """Prepare the next step while the device works on this one.

        What collating draws belongs to that step: the generator is afterwards as it was, so that a checkpoint between
        the two has the state of the step that was taken.

        Args:
            rows: Rows of the next step, of all processes.
            micro_batch: Rows of a micro-batch.
        """
        before = torch.get_rng_state()
        try:
            self._next = self.prepare(rows, micro_batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._next = None  # prepared in its own step then, which can do with less
        finally:
            torch.set_rng_state(before)

    def _prepared(self, rows: Sequence[int], micro_batch: int) -> PreparedStep:
        step, self._next = self._next, None
        if step is None or (step.rows, step.micro_batch) != (rows, micro_batch):
            return self.prepare(rows, micro_batch)
        before, after = step.drawn
        if not torch.equal(before, torch.get_rng_state()):  # a checkpoint was loaded, or somebody has seeded
            return self.prepare(rows, micro_batch)
        torch.set_rng_state(after)
        return step

    def prepare(self, rows: Sequence[int], micro_batch: int) -> PreparedStep:
        """Collate this process's share of a step and send it to the device.

        Args:
            rows: Rows of the step, of all processes.
            micro_batch: Rows of a micro-batch.
        """
        processes, objective = self.processes, self.task.objective
        pieces = micro_batches(
            rows,
            self.rows_of.lengths,
            micro_batch,
            tokens=self.settings.per_device_train_tokens,
            processes=processes.world_size,
            process=processes.rank,
        )
        before = torch.get_rng_state()
        # A process without rows left takes part with weight zero: the others wait for its gradients.
        examples = [[self.rows_of.examples[row] for row in piece or rows[:1]] for piece in pieces]
        batches = [objective.prepare(self._collated(some), self.model) for some in examples]
        weights = [objective.num_targets(batch) if piece else 0 for piece, batch in zip(pieces, batches, strict=True)]
        sent = [moved(batch, processes.device) for batch in batches]
        return PreparedStep(rows, micro_batch, examples, sent, weights, (before, torch.get_rng_state()))

    def _collated(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate examples into tensors (B, T) on the host."""
        if self.settings.packing:
            return pack(examples, self.tokenizer, self.max_length)
        return self.task.collator.collate_training(examples, self.tokenizer)

    def _compiled(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.compiled is None else self.compiled.active()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.processes.device.type, self.dtype)
