"""Memory that a machine adds to a traced step, learnt from the runs that were planned and measured on it.

Kept in the cache folder by processor, torch version and thread count. Until there are runs, the defaults hold; the
median counts, so that one run beside other work changes little.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from graftwerk.models.cache import recall, remember
from graftwerk.models.hardware import machine_key

NAME = "plans-6"
"""The number grows when the plan changes, since what was learnt holds for one way of planning."""
LATEST = 15
"""Runs that are remembered."""
PROCESS_BYTES = 12_000_000.0
"""Memory of a training on a CPU beside its tensors and their gaps: loggers, kernels' scratch."""
QUANTIZED_BYTES = 45_000_000
"""Memory that importing bitsandbytes adds on a CPU."""


@dataclass(frozen=True)
class Calibration:
    """Terms of a plan that depend on the machine.

    Attributes:
        process_bytes: Memory of a process beside what its allocator holds for tensors; 0 on an accelerator.
        time_factor: Measured seconds of a step by the planned ones without calibration.
        runs: Number of runs that they were learnt from.
    """

    process_bytes: float
    time_factor: float
    runs: int


def calibration(kind: str) -> Calibration:
    """Return the terms of this machine."""
    known = _known(kind)
    default = PROCESS_BYTES if kind == "cpu" else 0.0
    return Calibration(
        statistics.median([default, *(each[0] for each in known)]),
        statistics.median([1.0, *(each[1] for each in known)]),
        len(known),
    )


def learn(kind: str, process_bytes: float, time_factor: float) -> None:
    """Remember what a run took beside its plan; a figure that no run can have is left out.

    Args:
        kind: Kind of the device that trained.
        process_bytes: Its measured peak without weights and what the allocator holds for tensors.
        time_factor: Its seconds of a step by the planned ones without calibration.
    """
    if 0 <= process_bytes < 2e9 and 0.01 < time_factor < 100:
        remember(NAME, machine_key(kind), [*_known(kind), [process_bytes, time_factor]][-LATEST:])


def _known(kind: str) -> list[tuple[float, float]]:
    kept = recall(NAME, machine_key(kind))
    if not isinstance(kept, list):
        return []
    pairs = [each for each in kept if isinstance(each, list) and len(each) == 2]
    return [(float(a), float(b)) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
