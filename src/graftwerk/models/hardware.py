"""Compute type and number of threads that are fast on this machine, found by measuring.

Hardware that takes a type is often slow in it: a processor without bfloat16 instructions multiplies bfloat16 matrices
several times slower than float32. So nothing is assumed from names; a short matrix product in each type decides.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from graftwerk.devices import backend, synchronize
from graftwerk.errors import ConfigError
from graftwerk.models.cache import recall, remember

TYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SIDE = {"cpu": 256, "cuda": 4096, "xpu": 4096, "mps": 2048}
"""Side of the square matrices of the probe: large enough to show the kernel, small enough to take milliseconds."""

ENVIRONMENT = "GRAFTWERK_COMPUTE_TYPE"
"""What `auto` means for a whole process, or for machines that are to compute alike; unset: what the probe finds."""

ROUNDS = 3
"""Times that each type is measured, in turn, so that other work on the machine does not fall on one of them alone."""

WORTH = 1.2
"""A shorter type must be this much faster than float32; less is not worth its rounding."""


def compute_type(wanted: str = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """Return the compute type for autocast. Trained weights and optimizer state stay float32.

    Args:
        wanted: `float32`, `bfloat16`, `float16`, or `auto`: the fastest of them here, unless the environment
            variable `GRAFTWERK_COMPUTE_TYPE` says which. Bfloat16 goes before float16,
            whose range is small, unless float16 is clearly faster; on a processor float16 is never chosen,
            since its gradients cannot be scaled there.
        device: The device that multiplies.

    Raises:
        ConfigError: another name, or a type that this device cannot multiply in.
    """
    kind = torch.device(device).type
    where = "training.compute_type"
    if wanted == "auto" and (wanted := os.environ.get(ENVIRONMENT) or "auto") != "auto":
        where = ENVIRONMENT
    if wanted == "auto":
        return TYPES[_fastest(probe(kind), kind)]
    if wanted not in TYPES:
        raise ConfigError(f"there is no compute type `{wanted}`", where=where, hint=f"auto, {', '.join(TYPES)}")
    if wanted != "float32" and math.isinf(_seconds(TYPES[wanted], kind, limit=math.inf)):
        raise ConfigError(f"this {kind} cannot compute in {wanted}", where=where, hint="use `auto`")
    return TYPES[wanted]


def frozen_dtype(compute: torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the type that a frozen base is loaded in unless a run file says another.

    On an accelerator it is the compute type: half the memory, and no weight is cast in each pass. Autocast on a CPU
    casts weights in passing: types of 16 bits made steps there 2 to 8 % faster, which is not worth their rounding.

    Args:
        compute: Compute type.
        device: The device that multiplies.
    """
    return torch.float32 if torch.device(device).type == "cpu" else compute


def _fastest(seconds: dict[str, float], kind: str) -> str:
    best = "float32"
    for name in ("bfloat16",) if kind == "cpu" else ("bfloat16", "float16"):
        if seconds[name] * WORTH < seconds[best]:
            best = name
    return best


def probe(kind: str = "cpu") -> dict[str, float]:
    """Measure the seconds of one square matrix product by type, infinite if the device cannot do it; once per machine.

    Kept in the cache folder by processor, torch version and thread count.
    """
    return dict(_probed(machine_key(kind), kind))


@cache
def _probed(key: str, kind: str) -> dict[str, float]:
    kept = recall("compute-types", key)
    if (
        isinstance(kept, dict)
        and set(kept) == set(TYPES)
        and all(isinstance(value, int | float) for value in kept.values())
    ):
        return {name: float(value) for name, value in kept.items()}
    seconds = dict.fromkeys(TYPES, math.inf)
    for _ in range(ROUNDS):
        for name, dtype in TYPES.items():
            # A type that is already many times slower than float32 in its first product is not tried further.
            seconds[name] = min(seconds[name], _seconds(dtype, kind, limit=4 * seconds["float32"]))
    # JSON has no infinity; a number that no product takes stands for it.
    remember("compute-types", key, {name: min(value, 1e9) for name, value in seconds.items()})
    return seconds


def _seconds(dtype: torch.dtype, kind: str, *, limit: float) -> float:
    """Return the shortest time of a few products in seconds; stop early above ``limit``."""
    try:
        a = torch.ones(SIDE.get(kind, 1024), SIDE.get(kind, 1024), dtype=dtype, device=kind)
        return shortest_seconds(lambda: torch.mm(a, a), a.device, limit=limit)
    except (RuntimeError, TypeError, AssertionError):  # torch's ways of saying that there is no such kernel or device
        return math.inf


def shortest_seconds(call: Callable[[], object], device: torch.device, *, limit: float = math.inf) -> float:
    """Return the shortest time of a few calls in seconds, without gradients; stop early above ``limit``.

    Args:
        call: What is timed.
        device: The device that works.
        limit: Seconds above which no further call is made.
    """
    best = math.inf
    with torch.inference_mode():
        call()  # the first one sets kernels up
        for _ in range(5):
            synchronize([device])
            start = time.perf_counter()
            call()
            synchronize([device])
            best = min(best, time.perf_counter() - start)
            if best > limit:
                break
    return best


def machine_key(kind: str) -> str:
    """Return the cache key of what is measured here: speeds depend on device, torch version and thread count."""
    return f"{kind}: {device_name(kind)}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def device_name(kind: str = "cpu") -> str:
    """Return the processor's or accelerator's name, as the system gives it."""
    module = backend(torch.device(kind))
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name())  # type: ignore[union-attr]
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores this process may use: the smaller of affinity mask and control group quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def threads_wanted() -> int:
    """Return the number of compute threads: `OMP_NUM_THREADS` if set, else all usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else usable_cores()


def set_threads(threads: int | None = None) -> int:
    """Set torch's number of threads.

    More threads than cores make torch many times slower, and inside a container torch counts the whole machine's cores.

    Args:
        threads: The number, or None for `threads_wanted`.

    Returns:
        The number now in use.

    Raises:
        ConfigError: The number is less than one.
    """
    if threads is None:
        threads = threads_wanted()
    if threads < 1:
        raise ConfigError(f"{threads} threads are too few", hint="at least 1")
    # Also where the number stays: the first call in a forked process puts torch's pool of threads in place of the
    # parent's, of which only the number is left there. Left to several threads at once (transformers loads weights in
    # some), that fails: "Invalid thread pool".
    torch.set_num_threads(threads)
    return threads
