"""Seconds of a step: those of its operations, scaled from the traced rows to all rows, and what calling them costs.

    t = sum of t_o over all operations + (calls + STEP) CALL t_c

Legend: t_o seconds of an operation on its operands (`call_times`); t_c seconds of the smallest operation there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graftwerk.evaluation.inference import batches_of
from graftwerk.tasks.base import Example
from graftwerk.tasks.tokenization import padded_length
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.planning.call_times import CallTimes
from graftwerk.training.planning.meter import Call, Work
from graftwerk.training.settings import TrainingSettings

CALL, STEP = 13, 100
"""Overhead of an operation in a step, in probed calls (Python, modules and autograd), and that of a step in operations:
its batch, the loop and progress."""
SAMPLED = 200
"""Steps of the first epoch whose lengths stand for all."""


@dataclass(frozen=True)
class StepWork:
    """The operations of a traced step that allocate or write a tensor: no views.

    Attributes:
        calls: Those of its micro-batches.
        update: Those of its optimizer.
        tokens: Tokens of the micro-batches, padding included.
        squares: Rows times squared length, summed over them.
        micro_batches: Number of micro-batches.
    """

    calls: Mapping[Call, Work]
    update: Mapping[Call, Work]
    tokens: int
    squares: int
    micro_batches: int

    def carried_on(self, deeper: StepWork, factor: float) -> StepWork:
        """Return the work of a model that is deeper by ``factor`` times the difference between two others.

        Args:
            deeper: The work of the deeper one of the two; this is that of the other.
            factor: Ratio of the differences in depth.
        """

        def times(call: Call) -> float:
            low, high = (one[call].times if call in one else 0.0 for one in (self.calls, deeper.calls))
            return low + factor * (high - low)

        calls = {call: replace(work, times=times(call)) for call, work in {**self.calls, **deeper.calls}.items()}
        # The optimizer updates all parameters in one call, which is another one at each depth.
        low, high = (sum(work.times * work.moved for work in one.update.values()) for one in (self, deeper))
        share = (low + factor * (high - low)) / max(high, 1)
        update = {call: replace(work, times=share * work.times) for call, work in deeper.update.items()}
        return replace(self, calls=calls, update=update)


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

    def seconds(self, traced: StepWork, times: CallTimes) -> float:
        """Return the seconds of the step.

        Args:
            traced: The work of a step on the longest rows.
            times: Seconds of operations.
        """
        times.learn({**traced.calls, **traced.update})
        by_token, by_square = self.tokens / traced.tokens, self.squares / traced.squares
        overhead, batches = CALL * times.speeds.call_seconds, self.batches / traced.micro_batches
        total = STEP * overhead
        for call, work in traced.calls.items():
            scale = by_square if work.attention else by_token
            total += work.times * (scale * times.seconds(call, work) + batches * overhead)
        for call, work in traced.update.items():
            total += work.times * (times.seconds(call, work) + overhead)
        return total


def mean_step(
    train: Sequence[Example], training: TrainingSettings, micro: int, num_processes: int, dtype: torch.dtype
) -> MeanStep:
    """Return the mean of the first steps of a training.

    Args:
        train: Training rows.
        training: Training settings.
        micro: Rows of a micro-batch of one process.
        num_processes: Processes that share the rows of a step.
        dtype: Type that products are computed in.
    """
    sampled = min(_sampler(train, training).steps_per_epoch, SAMPLED)
    shapes = list(_shapes(train, training, micro, num_processes, sampled, dtype))
    tokens = sum(rows * width for rows, width in shapes)
    squares = sum(rows * width**2 for rows, width in shapes)
    return MeanStep(tokens / sampled, squares / sampled, len(shapes) / sampled)


def shapes_of(
    train: Sequence[Example],
    training: TrainingSettings,
    micro: int,
    num_processes: int,
    steps: int,
    dtype: torch.dtype,
) -> int:
    """Return the number of different shapes (rows, length) that micro-batches have in the first steps of a training.

    Args:
        train: Training rows.
        training: Training settings.
        micro: Rows of a micro-batch of one process.
        num_processes: Processes that share the rows of a step.
        steps: Steps of the training.
        dtype: Type that products are computed in.
    """
    return len(set(_shapes(train, training, micro, num_processes, min(steps, SAMPLED), dtype)))


def evaluated_shapes(examples: Sequence[Example], batch_size: int, dtype: torch.dtype) -> int:
    """Return the number of different shapes (rows, length) that the batches of an evaluation have.

    Args:
        examples: Evaluated rows.
        batch_size: Rows of a batch.
        dtype: Type that products are computed in.
    """
    batches = [[examples[row].length for row in rows] for rows in batches_of(examples, batch_size)]
    longest = max((lengths[0] for lengths in batches), default=0)
    return len({(len(lengths), _width(lengths[0], longest, dtype)) for lengths in batches})


def _width(length: int, longest: int, dtype: torch.dtype) -> int:
    """Return the tokens of each row of a batch, as `evaluation.inference.collated` pads it."""
    return length if dtype == torch.float32 else padded_length(length, longest)


def _shapes(
    train: Sequence[Example],
    training: TrainingSettings,
    micro: int,
    num_processes: int,
    steps: int,
    dtype: torch.dtype,
) -> Iterator[tuple[int, int]]:
    """Yield rows and length of each micro-batch of the first steps."""
    sampler, most = _sampler(train, training), training.per_device_train_tokens
    if training.packing or most is not None:  # not padded further
        dtype = torch.float32
    if most is not None:  # tokens bound a micro-batch, and rows only the step
        micro *= training.gradient_accumulation_steps
    for step in range(steps):
        for piece in micro_batches(sampler(step), sampler.lengths, micro, tokens=most, processes=num_processes):
            length = max((sampler.lengths[row] for row in piece), default=0)
            yield len(piece), _width(length, sampler.longest, dtype)


def _sampler(train: Sequence[Example], training: TrainingSettings) -> BatchSampler:
    return BatchSampler(train, training.global_batch_size(), seed=training.seed, group=training.length_group)
