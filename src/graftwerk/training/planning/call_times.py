"""Seconds of single operations on this machine, each timed alone on tensors as large as those of a step.

A speed for all products and one for all other operations would be wrong by what shapes, kernels and caches make of
them, up to a factor of two. A step has a few dozen different operations, so timing them takes less than a step does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graftwerk.models.cache import recall, remember
from graftwerk.models.hardware import machine_key
from graftwerk.training.planning.meter import Call, Operand, Work

LINEAR_SPEED, ATTENTION_SPEED, MOVED_SPEED = 0.92, 0.23, 1.25
"""Speeds in a step by the probed ones: of products with weights, of attention, and of all other operations; used for
operations that are not timed."""
PROBED_ELEMENTS, PROBED_CALLS = 1 << 22, 200
NAME = "operations"
KEPT = 3000
"""Operations that are kept for later plans."""
IN_STEP = 1.06
"""Seconds of an operation in a step by those alone: its operands are not in the processor's caches."""
ROUNDS, CALLS, ROUND_SECONDS = 3, 3, 0.02
"""Rounds in which each operation is timed; most calls in one, and seconds after which no further call is made."""
LEAST_OPERATIONS, LEAST_BYTES = 1_000_000, 100_000
"""Below both a call is all overhead, and is not timed."""
MOST_SECONDS, MOST_BYTES = 0.2, 1 << 28
"""An operation that would take longer, or moves more bytes, is worked out from the speeds of the machine."""


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

    def seconds(self, work: Work) -> float:
        """Return the seconds of a call in a step, without its overhead, as far as speeds tell them."""
        share = ATTENTION_SPEED if work.attention else LINEAR_SPEED
        return work.operations / share / self.operations + work.moved / MOVED_SPEED / self.bytes


class CallTimes:
    """Seconds of calls in a step, without their overhead.

    Args:
        speeds: Speeds of the machine, for what is not timed.
        kind: Kind of the device; only on a CPU operations are timed.

    Example:
        >>> times = CallTimes(Speeds(operations=1e11, bytes=1e10, call_seconds=1e-6), "cpu")
        >>> operand = Operand((8, 8), (8, 1), torch.float32)
        >>> add = Call(torch.ops.aten.add.Tensor, (operand, operand), ())
        >>> f"{times.seconds(add, Work(times=1, operations=0, attention=False, moved=3 * 256)):.1e}"  # not timed
        '6.1e-08'
    """

    def __init__(self, speeds: Speeds, kind: str) -> None:
        self.speeds, self.kind, self._key = speeds, kind, machine_key(kind)
        kept = recall(NAME, self._key)
        known = kept.items() if isinstance(kept, dict) else ()
        self._known = {name: value for name, value in known if isinstance(value, float) and 0 < value < math.inf}

    def learn(self, calls: Mapping[Call, Work]) -> None:
        """Time the calls that are not known yet, and keep their seconds for later plans.

        Every call is timed in each of several rounds, and the shortest time counts: other work on the machine would
        disturb calls that follow each other at once.

        Args:
            calls: Calls and the work of each.
        """
        new = {_name(call): call for call, work in calls.items() if self._is_timed(call, work)}
        found = {name: math.inf for name in new if name not in self._known}
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            for turn in range(ROUNDS):
                for name in list(found):
                    seconds = _alone(new[name], warm=turn == 0)
                    found[name] = min(found[name], seconds)
                    if math.isnan(seconds):
                        del found[name]
        if found:
            self._known |= found
            remember(NAME, self._key, dict(list(self._known.items())[-KEPT:]))

    def seconds(self, call: Call, work: Work) -> float:
        """Return the seconds of one call: as timed, or by the speeds of the machine if it was not.

        Args:
            call: The operation and its operands.
            work: The work of the call.
        """
        alone = self._known.get(_name(call)) if self._is_timed(call, work) else None
        return self.speeds.seconds(work) if alone is None else IN_STEP * alone

    def _is_timed(self, call: Call, work: Work) -> bool:
        small = work.operations < LEAST_OPERATIONS and work.moved < LEAST_BYTES
        large = self.speeds.seconds(work) > MOST_SECONDS or max(work.moved, _bytes(call)) > MOST_BYTES
        return self.kind == "cpu" and not small and not large and call.operation.namespace in ("aten", "bitsandbytes")


def _name(call: Call) -> str:
    """Return a short name of a call: the operation, and a digest of what it is called with."""
    return f"{call.operation} {hashlib.sha256(repr(call).encode()).hexdigest()[:16]}"


def _alone(call: Call, warm: bool) -> float:
    """Return the shortest time of a few calls in seconds, or NaN if it cannot be made outside of a step."""
    given, named = _made(call.given), {name: _made(value) for name, value in call.named}
    best, spent = math.inf, 0.0
    try:
        if warm:
            call.operation(*given, **named)
        for _ in range(CALLS):
            start = time.perf_counter()
            call.operation(*given, **named)
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
            if spent > ROUND_SECONDS:
                break
    except (RuntimeError, IndexError, ValueError):  # needs operands with certain values
        return math.nan
    return best


def _bytes(call: Call) -> int:
    """Return the bytes of all operands."""
    found, left = 0, [call.given, [value for _, value in call.named]]
    while left:
        for value in left.pop():
            if isinstance(value, Operand):
                found += _extent(value) * value.dtype.itemsize
            elif isinstance(value, tuple):
                left.append(value)
    return found


def _extent(operand: Operand) -> int:
    """Return the number of values between the first and the last of an operand, both included."""
    if not all(operand.shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(operand.shape, operand.stride, strict=True))


def _made(value: Any) -> Any:
    """Return an argument with tensors for its operands: zeros for integers, numbers below one for all others."""
    if isinstance(value, Operand):
        size = _extent(value)
        flat: Tensor = torch.zeros(size, dtype=value.dtype, device="cpu")
        if value.dtype.is_floating_point:
            flat.uniform_(0.1, 0.9)
        return flat.as_strided(value.shape, value.stride)
    if isinstance(value, tuple):
        return [_made(one) for one in value]
    return value


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
