"""Seconds of a step: what a trace counts at the probed speeds of the machine, scaled from the traced rows to all rows.

    t = linear / s_p + attention / s_a + moved / s_m + calls t_c

Legend: linear, attention floating-point operations; moved bytes; s speeds, t_c seconds of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from graftwerk.evaluation.inference import batches_of
from graftwerk.tasks.base import Example
from graftwerk.tasks.tokenization import padded_length
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.settings import TrainingSettings

LINEAR, ATTENTION, MOVED = 0.92, 0.23, 1.25
"""Speeds in a step by the probed ones: of products with weights, of attention, and of all other operations."""
CALL = 19
"""Overhead of an operation in a step, in probed calls: Python, modules and autograd."""
PROBED_ELEMENTS, PROBED_CALLS = 1 << 22, 200
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

    def seconds(self, traced: Mapping[str, float], speeds: Speeds) -> float:
        """Return the seconds of the step.

        Args:
            traced: Figures of a traced step, named as in `step_trace.StepTrace`.
            speeds: Of the machine.
        """
        by_token, by_square = self.tokens / traced["tokens"], self.squares / traced["squares"]
        linear = (traced["operations"] - traced["attention"]) * by_token / LINEAR
        attention = traced["attention"] * by_square / ATTENTION
        moved = traced["moved"] * by_token + traced["update_moved"]
        calls = traced["calls"] / traced["micro_batches"] * self.batches + traced["update_calls"]
        return (
            (linear + attention) / speeds.operations + moved / MOVED / speeds.bytes + calls * CALL * speeds.call_seconds
        )


@dataclass(frozen=True)
class Speeds:
    """Speeds of a machine, as a few simple operations reach them.

    Attributes:
        operations: Floating-point operations in a second, in square matrix products.
        bytes: Bytes that an activation function reads and writes in a second.
        call_seconds: Seconds of an operation on a few numbers.
    """

    operations: float
    bytes: float
    call_seconds: float


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


def speeds_of(dtype: torch.dtype, kind: str) -> Speeds:
    """Return the speeds of this machine, measured once.

    Args:
        dtype: Type that products are computed in.
        kind: Kind of the device.
    """
    from graftwerk.models.hardware import SIDE, machine_key, probe

    bytes_a_second, call_seconds = _probed(machine_key(kind), kind)
    product = probe(kind)[str(dtype).removeprefix("torch.")]
    return Speeds(2 * SIDE.get(kind, 1024) ** 3 / product, bytes_a_second, call_seconds)


@cache
def _probed(key: str, kind: str) -> tuple[float, float]:
    """Measure bytes in a second and seconds of a call; kept in the cache folder."""
    from graftwerk.models.cache import recall, remember
    from graftwerk.models.hardware import shortest_seconds

    kept = recall("speeds", key)
    if isinstance(kept, list) and len(kept) == 2 and all(isinstance(value, float) and value > 0 for value in kept):
        return kept[0], kept[1]
    many, few = torch.ones(PROBED_ELEMENTS, device=kind), torch.ones(16, device=kind)
    moved = 2 * many.nbytes / shortest_seconds(lambda: torch.nn.functional.gelu(many), many.device)
    call = shortest_seconds(lambda: [few + few for _ in range(PROBED_CALLS)], few.device) / PROBED_CALLS
    remember("speeds", key, [moved, call])
    return moved, call
