"""Number of processes of a training on a CPU: as the settings say, or as rows, model and machine are worth.

A process that has computed before (a notebook, a second training) trains alone, since a fork would lack the threads
that are at work; asking for more is then an error.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.errors import ConfigError, GraftwerkError, UnsupportedError
from graftwerk.machine import available
from graftwerk.training.forked_workers import KEY, ended

if TYPE_CHECKING:
    from graftwerk.config import RunConfig
    from graftwerk.training.checkpoint import Checkpoints

ENVIRONMENT = "GRAFTWERK_PROCESSES"
"""Environment variable with the number that `auto` means; without it, `resolve_num_processes` finds one."""

ROWS_EACH = 8
"""Rows of a step for which another process pays off."""
LEAST_PARAMETERS = 5_000_000
"""Smallest model for which several processes pay off; a smaller one spends its steps in Python."""
COPIES = 3
"""Copies of the weights that a process is assumed to hold: the weights, the file, their casts."""
FREE_SHARE = 0.5
"""Share of the free memory that all copies together may take."""

FORKABLE = frozenset({"jemalloc_bg_thd"})
"""Threads by name that survive a fork: that of the allocator of pyarrow, which pandas imports."""


def resolve_num_processes(settings: RunConfig, checkpoints: Checkpoints, resume: bool) -> int:
    """Return how many processes are to train, 1 if a launcher has started this one.

    `auto` takes one per core with `ROWS_EACH` rows of a step for each, on a CPU, if the model is not tiny and memory
    holds the copies; a resumed run keeps its number.

    Raises:
        ConfigError: The settings give a number, and the launcher's is another, or a step has fewer rows, or the layers
            are to be compiled.
        UnsupportedError: The settings give several, and this process cannot be forked; the message gives the reason.
    """
    asked = settings.training.processes
    if "RANK" in os.environ:
        world = os.environ.get("WORLD_SIZE", "1")
        if asked not in ("auto", int(world)):
            raise ConfigError(
                f"`processes: {asked}`, but {world} were launched", where=KEY, hint="auto: the launcher decides"
            )
        return 1
    check_processes(settings)
    rows = settings.training.global_batch_size()
    if settings.training.compile:
        return 1
    if asked == "auto":
        count = (
            (_num_processes_of_run(checkpoints) if resume else None)
            or _from_environment()
            or _worthwhile(settings, rows)
        )
        return count if 1 < count <= rows and _against() is None else 1
    if asked > 1 and (against := _against()):
        raise UnsupportedError(f"{asked} processes cannot be started here: {against[0]}", where=KEY, hint=against[1])
    return asked


def check_processes(settings: RunConfig) -> None:
    """Raise if the number of processes that the settings ask for cannot be used.

    Raises:
        ConfigError: The settings ask for more processes than a step has rows, or to compile in several.
    """
    asked = settings.training.processes
    rows = settings.training.global_batch_size()
    if settings.training.compile and asked not in ("auto", 1) and "RANK" not in os.environ:
        raise ConfigError(
            "each forked process would compile the layers for itself, in turn with the others",
            where=KEY,
            hint="training.processes=1, or training.compile=false",
        )
    if asked != "auto" and asked > rows and "RANK" not in os.environ:
        raise ConfigError(f"{asked} processes cannot share a step's {rows} rows", where=KEY, hint=f"at most {rows}")


def _from_environment() -> int | None:
    given = os.environ.get(ENVIRONMENT, "")
    if not given:
        return None
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{given!r} is not a number of processes", where=ENVIRONMENT, hint="1, 2, ...")
    return int(given)


def _against() -> tuple[str, str] | None:
    """Return the reason why this process cannot be forked and a hint, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "only Linux can fork a process that has imported torch", "accelerate launch, or auto"
    from graftwerk.devices import best_device

    if best_device().type != "cpu":
        return "forked processes share a CPU, and this machine computes on an accelerator", "accelerate launch, or auto"
    from accelerate.state import PartialState

    hint = "run `graftwerk train`, or train before anything else computes in this process"
    if PartialState._shared_state:
        return "accelerate is in use in this process already", hint
    if not _alone():
        return "threads of this process are at work or have been", hint
    return None


def _alone() -> bool:
    """Return True if this process has one thread, not counting those that survive a fork.

    The linear algebra of numpy and scipy starts threads when it is imported, which idle; at any fork it ends them, in
    the parent too, and starts them again when they are needed. So after a fork that ends at once only threads that
    matter are left.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() beside threads warns; this probe detects that case
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    ended(pid, wait=True)
    for _ in range(20):  # threads take a moment to end
        try:
            names = [entry.read_text().strip() for entry in Path("/proc/self/task").glob("*/comm")]
        except OSError:
            continue  # one ended while it was looked at
        if len([name for name in names if name not in FORKABLE]) == 1:
            return True
        time.sleep(0.002)
    return False


def _worthwhile(settings: RunConfig, rows: int) -> int:
    from graftwerk.models.hardware import threads_wanted
    from graftwerk.models.load import load_config

    count = min(threads_wanted(), rows // ROWS_EACH)
    method = settings.method
    if count < 2 or method.kind == "weights":  # reducing a gradient as large as the model takes too long
        return 1
    if settings.training.trunk_cache is not False and (method.name == "probe" or getattr(method, "layers", None)):
        return 1  # the part of a step above the cached layers is too little to share
    try:
        architecture: Any = load_config(settings.model, settings.revision).get_text_config()
    except GraftwerkError:
        return 1  # reported when the model is loaded
    width, layers = (getattr(architecture, name, 0) or 0 for name in ("hidden_size", "num_hidden_layers"))
    parameters = 12 * layers * width**2 + width * (getattr(architecture, "vocab_size", 0) or 0)
    if parameters < LEAST_PARAMETERS:
        return 1
    fitting = int(FREE_SHARE * (available() or 0) // (4 * COPIES * parameters))
    return max(1, min(count, fitting))


def _num_processes_of_run(checkpoints: Checkpoints) -> int | None:
    from graftwerk.serialization.untrusted_files import read_json
    from graftwerk.training.run_dir import STATE

    for step in reversed(checkpoints.steps()):
        with suppress(GraftwerkError, OSError, KeyError, TypeError, ValueError):
            state = read_json(checkpoints.path(step) / STATE)
            return int(state["processes"]) if state.get("sharing") else 1  # launched ones are launched again
    return None
