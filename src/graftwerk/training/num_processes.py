"""How many processes a training on a processor takes: what was asked for, or what rows, model and machine are worth.

Whoever has computed before (a notebook, a second training in one process) trains with one process, since a fork would
lack the threads that are at work, and is told so if they asked for more.
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
"""What `auto` means for a whole process; unset: what `wanted` finds."""

ROWS_EACH = 8
"""Rows of a step that are worth a process of their own."""
LEAST_PARAMETERS = 5_000_000
"""A smaller model spends its steps in Python, and its start would weigh more than what is gained."""
COPIES = 3
"""Times its weights that a process is taken to hold: they, what they are read from, what is cast of them."""
FREE_SHARE = 0.5
"""Of the free memory that all copies together may take."""

FORKABLE = frozenset({"jemalloc_bg_thd"})
"""Threads by name that a fork makes anew: that of the allocator of pyarrow, which sklearn and pandas import."""


def resolve_num_processes(settings: RunConfig, checkpoints: Checkpoints, resume: bool) -> int:
    """How many processes are to train; 1 where a launcher has begun this one.

    `auto` takes as many as there are cores, with `ROWS_EACH` rows of a step for each, where this is a processor, the
    model is not tiny and memory holds the copies; a run that is gone on with keeps the number it was begun with.

    Raises:
        ConfigError: a number was asked for, and the launcher's is another, or a step has fewer rows.
        UnsupportedError: several were asked for, and this process cannot be forked; why is said.
    """
    asked = settings.training.processes
    if "RANK" in os.environ:
        world = os.environ.get("WORLD_SIZE", "1")
        if asked not in ("auto", int(world)):
            raise ConfigError(
                f"`processes: {asked}`, but {world} were launched", where=KEY, hint="auto: the launcher decides"
            )
        return 1
    rows = check_processes(settings)
    if asked == "auto":
        count = (_begun_with(checkpoints) if resume else None) or _of_environment() or _worth(settings, rows)
        return count if 1 < count <= rows and _against() is None else 1
    if asked > 1 and (against := _against()):
        raise UnsupportedError(f"{asked} processes cannot be begun here: {against[0]}", where=KEY, hint=against[1])
    return asked


def check_processes(settings: RunConfig) -> int:
    """Return the rows of a step.

    Raises:
        ConfigError: more processes are asked for than a step has rows.
    """
    asked = settings.training.processes
    rows = settings.training.per_device_train_batch_size * settings.training.gradient_accumulation_steps
    if asked != "auto" and asked > rows and "RANK" not in os.environ:
        raise ConfigError(f"{asked} processes cannot share a step's {rows} rows", where=KEY, hint=f"at most {rows}")
    return rows


def _of_environment() -> int | None:
    given = os.environ.get(ENVIRONMENT, "")
    if not given:
        return None
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{given!r} is no number of processes", where=ENVIRONMENT, hint="1, 2, ...")
    return int(given)


def _against() -> tuple[str, str] | None:
    """Why this process cannot be forked, and what to do; None where it can."""
    if not sys.platform.startswith("linux"):
        return "only Linux can fork a process that has imported torch", "accelerate launch, or auto"
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return "they share a processor, and this machine computes on an accelerator", "accelerate launch, or auto"
    from accelerate.state import PartialState

    anew = "run `graftwerk train`, or train before anything else computes in this process"
    if PartialState._shared_state:
        return "accelerate is in use in this process already", anew
    if not _alone():
        return "threads of this process are at work or have been", anew
    return None


def _alone() -> bool:
    """Whether this process has one thread, those left out that know how to be forked.

    The linear algebra of numpy and scipy starts threads when it is imported, which idle; at any fork it ends them, in
    the parent too, and starts them again when they are needed. So a fork that ends at once leaves those that matter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what is to be found
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    ended(pid, wait=True)
    for _ in range(20):  # threads take a moment to be gone
        try:
            names = [entry.read_text().strip() for entry in Path("/proc/self/task").glob("*/comm")]
        except OSError:
            continue  # one ended while it was looked at
        if len([name for name in names if name not in FORKABLE]) == 1:
            return True
        time.sleep(0.002)
    return False


def _worth(settings: RunConfig, rows: int) -> int:
    from graftwerk.models.hardware import threads_wanted
    from graftwerk.models.load import load_config

    count = min(threads_wanted(), rows // ROWS_EACH)
    method = settings.method
    if count < 2 or method.kind == "weights":  # a gradient as large as the model is not worth its way
        return 1
    if settings.training.trunk_cache is not False and (method.name == "probe" or getattr(method, "layers", None)):
        return 1  # what is left of a step above the layers that are kept is too little to share
    try:
        architecture: Any = load_config(settings.model, settings.revision).get_text_config()
    except GraftwerkError:
        return 1  # said where the model is looked at
    width, layers = (getattr(architecture, name, 0) or 0 for name in ("hidden_size", "num_hidden_layers"))
    parameters = 12 * layers * width**2 + width * (getattr(architecture, "vocab_size", 0) or 0)
    if parameters < LEAST_PARAMETERS:
        return 1
    fitting = int(FREE_SHARE * (available() or 0) // (4 * COPIES * parameters))
    return max(1, min(count, fitting))


def _begun_with(checkpoints: Checkpoints) -> int | None:
    from graftwerk.serialization.untrusted_files import read_json
    from graftwerk.training.run_dir import STATE

    for step in reversed(checkpoints.steps()):
        with suppress(GraftwerkError, OSError, KeyError, TypeError, ValueError):
            state = read_json(checkpoints.path(step) / STATE)
            return int(state["processes"]) if state.get("sharing") else 1  # launched ones are launched again
    return None
