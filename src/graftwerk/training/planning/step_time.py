"""Seconds of a step: its operations at the probed speed of the machine, scaled from the traced rows to all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graftwerk.tasks.base import Example
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.settings import TrainingSettings

EFFICIENCY = 0.32
"""Share of the speed of a square matrix product that the products of a step reach (MiniLM and SmolLM2 on two cores)."""
CALL_SECONDS = 120e-6
"""Of each operation that makes a tensor, whatever its size: Python, modules and autograd around it."""
SAMPLED = 200
"""Steps of the first epoch whose lengths stand for all."""


@dataclass(frozen=True)
class MeanStep:
    """A step of one process, in the mean over the first ones.

    Attributes:
        tokens: Tokens, padding included.
        squares: Rows times squared length, summed over micro-batches.
        batches: Micro-batches.
        shapes: Different shapes (rows, length) of micro-batches in all of these steps.
    """

    tokens: float
    squares: float
    batches: float
    shapes: int = 1

    def seconds(self, traced: Mapping[str, float], speed: float) -> float:
        """Return the seconds of the step.

        Args:
            traced: Figures of a traced step, named as in `step_trace.StepTrace`.
            speed: Floating-point operations in a second.
        """
        linear = (traced["operations"] - traced["attention"]) / traced["tokens"] * self.tokens
        square = traced["attention"] / traced["squares"] * self.squares
        return (linear + square) / speed + traced["calls"] / traced["micro_batches"] * self.batches * CALL_SECONDS


def mean_step(train: Sequence[Example], training: TrainingSettings, micro: int, num_processes: int) -> MeanStep:
    """Return the mean of the first steps of a training.

    Args:
        train: Training rows.
        training: Training settings.
        micro: Rows of a micro-batch of one process.
        num_processes: Processes that share the rows of a step.
    """
    rows, most = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps,
        training.per_device_train_tokens,
    )
    sampler = BatchSampler(train, rows, seed=training.seed, group=training.length_group)
    sampled = min(sampler.steps_per_epoch, SAMPLED)
    if most is not None:  # tokens bound a micro-batch, and rows only the step
        micro *= training.gradient_accumulation_steps
    tokens = squares = batches = 0
    shapes: set[tuple[int, int]] = set()
    for step in range(sampled):
        chosen = sampler(step)
        for piece in micro_batches(chosen, sampler.lengths, micro, tokens=most, processes=num_processes):
            width = max((sampler.lengths[row] for row in piece), default=0)
            tokens += len(piece) * width
            squares += len(piece) * width**2
            batches += 1
            shapes.add((len(piece), width))
    return MeanStep(tokens / sampled, squares / sampled, batches / sampled, len(shapes))


def speed_of(dtype: torch.dtype, kind: str) -> float:
    """Return the floating-point operations that a step does in a second.

    Args:
        dtype: Type that forward passes compute in.
        kind: Kind of the device.
    """
    from graftwerk.models.hardware import SIDE, probe

    return EFFICIENCY * 2 * SIDE.get(kind, 1024) ** 3 / probe(kind)[str(dtype).removeprefix("torch.")]
