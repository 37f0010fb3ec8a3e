"""Seconds of a step: its operations at the probed speed of the machine, scaled from the traced rows to all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """

    tokens: float
    squares: float
    batches: float

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
    """Return the mean of the first steps of a training."""
    sampled = min(_sampler(train, training).steps_per_epoch, SAMPLED)
    shapes = list(_shapes(train, training, micro, num_processes, sampled))
    tokens = sum(rows * width for rows, width in shapes)
    squares = sum(rows * width**2 for rows, width in shapes)
    return MeanStep(tokens / sampled, squares / sampled, len(shapes) / sampled)


def shapes_of(train: Sequence[Example], training: TrainingSettings, micro: int, num_processes: int, steps: int) -> int:
    """Return the number of different shapes (rows, length) that micro-batches have in the first steps of a training.

    Args:
        train: Training rows.
        training: Training settings.
        micro: Rows of a micro-batch of one process.
        num_processes: Processes that share the rows of a step.
        steps: Steps of the training.
    """
    return len(set(_shapes(train, training, micro, num_processes, min(steps, SAMPLED))))


def _shapes(
    train: Sequence[Example], training: TrainingSettings, micro: int, num_processes: int, steps: int
) -> Iterator[tuple[int, int]]:
    """Yield rows and length of each micro-batch of the first steps."""
    sampler, most = _sampler(train, training), training.per_device_train_tokens
    if most is not None:  # tokens bound a micro-batch, and rows only the step
        micro *= training.gradient_accumulation_steps
    for step in range(steps):
        for piece in micro_batches(sampler(step), sampler.lengths, micro, tokens=most, processes=num_processes):
            yield len(piece), max((sampler.lengths[row] for row in piece), default=0)


def _sampler(train: Sequence[Example], training: TrainingSettings) -> BatchSampler:
    return BatchSampler(train, training.global_batch_size(), seed=training.seed, group=training.length_group)


def speed_of(dtype: torch.dtype, kind: str) -> float:
    """Return the floating-point operations that a step does in a second."""
    from graftwerk.models.hardware import SIDE, probe

    return EFFICIENCY * 2 * SIDE.get(kind, 1024) ** 3 / probe(kind)[str(dtype).removeprefix("torch.")]
