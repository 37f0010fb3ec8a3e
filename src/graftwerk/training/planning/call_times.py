"""Seconds of single operations on this machine, each timed alone on tensors as large as those of a step.

A speed for all products and one for all other operations would be wrong by what shapes, kernels and caches make of
them, up to a factor of two. A step has a few dozen different operations, so timing them takes less than a step does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from graftwerk.models.cache import recall, remember
from graftwerk.models.hardware import SIDE, machine_key, probe, shortest_seconds
from graftwerk.training.planning.meter import Call, Operand, Work

LINEAR_SPEED, ATTENTION_SPEED, MOVED_SPEED = 0.92, 0.23, 1.25
"""Speeds in a step by the probed ones: of products with weights, of attention, and of all other operations; used for
operations that are not timed."""
PROBED_ELEMENTS, PROBED_CALLS = 1 << 22, 200
NAME = "operations"
KEPT = 3000
"""Operations that are kept for later plans."""
IN_STEP = 1.06
"""Ratio of an operation's time in a step to its time alone, fitted; in a step, fewer operands are in caches."""
ROUNDS, CALLS, ROUND_SECONDS = 3, 3, 0.02
"""Rounds in which each operation is timed; most calls in one, and seconds after which no further call is made."""
BUDGET = 4.0
"""Seconds that one plan spends on timing at most, but for the last operation."""
LEAST_OPERATIONS, LEAST_BYTES = 1_000_000, 100_000
"""Below both a call is all overhead, and is not timed."""
MOST_SECONDS, MOST_BYTES = 0.2, 1 << 27
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
        self._known = _recalled(self._key)

    def learn(self, calls: Mapping[Call, Work]) -> None:
        """Time the calls that are not known yet, and keep their seconds for later plans.

        Those that count most come first, until `BUDGET` is spent. Each is timed in several rounds, and the shortest
        time counts, since other work on the machine slows calls that closely follow each other.

        Args:
            calls: Calls and the work of each.
        """
        timed = {call: work for call, work in calls.items() if self._is_timed(call, work)}
        order = sorted(timed, key=lambda call: -timed[call].times * self.speeds.seconds(timed[call]))
        left = {name: call for call in order if (name := _name(call)) not in self._known}
        found, end = dict[str, float | None](), time.perf_counter() + BUDGET
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            for turn in range(ROUNDS):
                for name, call in list(left.items()):
                    if time.perf_counter() > end:
                        break
                    seconds = _alone(call, warm=turn == 0)
                    found[name] = None if seconds is None else min(seconds, found.get(name) or math.inf)
                    if seconds is None or seconds > ROUND_SECONDS:
                        del left[name]
        if found:
            self._known = {**_recalled(self._key), **found}  # other processes may have timed more meanwhile
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
        if small or self.kind != "cpu" or call.operation.namespace not in ("aten", "bitsandbytes"):
            return False
        operands = sum(_extent(operand) * operand.dtype.itemsize for operand in _operands((call.given, call.named)))
        return self.speeds.seconds(work) <= MOST_SECONDS and max(work.moved, operands) <= MOST_BYTES


def _recalled(key: str) -> dict[str, float | None]:
    """Return the seconds of calls by name that were kept for a machine; None for what could not be timed."""
    kept = recall(NAME, key)
    known = kept.items() if isinstance(kept, dict) else ()
    return {name: value for name, value in known if value is None or (isinstance(value, float) and value > 0)}


def _name(call: Call) -> str:
    """Return a short name of a call: the operation, and a digest of what decides about its time."""

    def said(value: Any) -> str:
        if isinstance(value, tuple) and not isinstance(value, Operand):
            return f"({', '.join(map(said, value))})"
        if isinstance(value, Operand | int | str | torch.dtype | None):
            return repr(value)
        return type(value).__name__  # a learning rate, a generator

    digest = hashlib.sha256(said((call.given, call.named)).encode()).hexdigest()[:16]
    return f"{call.operation} {digest}"


def _alone(call: Call, warm: bool) -> float | None:
    """Return the shortest time of a few calls in seconds, or None if the call fails on made-up operands.

    Args:
        call: The call.
        warm: Call it once before, since the first call sets kernels up.
    """
    best, spent = math.inf, 0.0
    try:
        given, named = _made(call.given), {name: _made(value) for name, value in call.named}
        if warm:
            call.operation(*given, **named)
        for _ in range(CALLS):
            start = time.perf_counter()
            call.operation(*given, **named)
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
            if spent > ROUND_SECONDS:
                break
    except Exception:  # operands with other values, types without kernels, memory: the speeds have to do
        return None
    return best


def _operands(value: Any) -> Iterator[Operand]:
    """Yield all operands of nested tuples."""
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _operands(one)


def _extent(operand: Operand) -> int:
    """Return the number of values between the first and the last of an operand, both included."""
    if not all(operand.shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(operand.shape, operand.stride, strict=True))


def _made(value: Any) -> Any:
    """Return an argument with tensors for its operands: zeros for integers, which index any table; else halves."""
    if isinstance(value, Operand):
        fill = 0.5 if value.dtype.is_floating_point else 0
        return torch.full((_extent(value),), fill, dtype=value.dtype, device="cpu").as_strided(
            value.shape, value.stride
        )
    return [_made(one) for one in value] if isinstance(value, tuple) else value


def speeds_of(dtype: torch.dtype, kind: str) -> Speeds:
    """Return the speeds of this machine, measured once.

    Args:
        dtype: Type that products are computed in.
        kind: Kind of the device.
    """
    bytes_a_second, call_seconds = _probed(machine_key(kind), kind)
    product = probe(kind)[str(dtype).removeprefix("torch.")]
    return Speeds(2 * SIDE.get(kind, 1024) ** 3 / product, bytes_a_second, call_seconds)


@cache
def _probed(key: str, kind: str) -> tuple[float, float]:
    """Measure bytes in a second and seconds of a call; kept in the cache folder."""
    kept = recall("speeds", key)
    if isinstance(kept, list) and len(kept) == 2 and all(isinstance(value, float) and value > 0 for value in kept):
        return kept[0], kept[1]
    many, few = torch.ones(PROBED_ELEMENTS, device=kind), torch.ones(16, device=kind)
    moved = 2 * many.nbytes / shortest_seconds(lambda: torch.nn.functional.gelu(many), many.device)
    call = shortest_seconds(lambda: [few + few for _ in range(PROBED_CALLS)], few.device) / PROBED_CALLS
    remember("speeds", key, [moved, call])
    return moved, call
