"""Processes that train together on a processor: forked from this one before it has computed anything.

Small matrix products do not fill several threads: two processes of one thread each, which share a step's rows and add
their gradients, do more steps in the same time than one process of two threads (docs/decisions/0015). What the
processes do is what `accelerate launch` would have them do (`launch.py`); here they are only begun and ended.

A helper is a fork, which shares what is imported and costs no start of its own. Forking is safe as long as no thread
is at work: OpenMP's and the tokenizers' threads would be missing in the fork, which would wait for them. Whoever has
computed before (a notebook, a second training in one process) trains with one process, and is told so if they asked
for more. The processes meet through a file in a private folder and talk over the loopback interface: no port is
opened to the network.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.errors import ConfigError, EnvironmentFault, GraftwerkError, UnsupportedError

if TYPE_CHECKING:
    from graftwerk.config import RunConfig
    from graftwerk.train.checkpoint import Checkpoints

KEY = "training.processes"
ENVIRONMENT = "GRAFTWERK_PROCESSES"
"""What `auto` means for a whole process; unset: what `wanted` finds."""

ROWS_EACH = 8
"""Rows of a step that are worth a process of their own."""
LEAST_PARAMETERS = 5_000_000
"""A smaller model spends its steps in Python, and its start would weigh more than what is gained."""
COPIES = 3
"""Times its weights that a process may hold: they, what is cast of them, gradients of a full fine-tuning."""
FREE_SHARE = 0.5
"""Of the free memory that all copies together may take."""
_ENDING_SECONDS = 30.0
_SET = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "ACCELERATE_USE_CPU",
    "GLOO_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
)
"""What is put into the environment, here or by accelerate, and taken out again."""
_PR_SET_PDEATHSIG = 1


def wanted(settings: RunConfig, checkpoints: Checkpoints, resume: bool) -> int:
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
                f"`processes: {asked}`, but {world} were launched", where=KEY, mend="auto: the launcher decides"
            )
        return 1
    if asked == "auto" and (given := os.environ.get(ENVIRONMENT, "")):
        if not given.isdigit() or int(given) < 1:
            raise ConfigError(f"{given!r} is no number of processes", where=ENVIRONMENT, mend="1, 2, ...")
        asked = int(given)
    rows = settings.training.per_device_train_batch_size * settings.training.gradient_accumulation_steps
    if asked == "auto":
        against = _against()
        if resume and (begun := _begun_with(checkpoints)) is not None:
            return 1 if against else begun
        return 1 if against else _worth(settings, rows)
    if asked > rows:
        raise ConfigError(f"{asked} processes cannot share a step's {rows} rows", where=KEY, mend=f"at most {rows}")
    if asked > 1 and (against := _against()):
        raise UnsupportedError(f"{asked} processes cannot be begun here: {against[0]}", where=KEY, mend=against[1])
    return asked


def _against() -> tuple[str, str] | None:
    """Why this process cannot be forked, and what to do; None where it can."""
    if sys.platform != "linux":
        return "only Linux can fork a process that has imported torch", "accelerate launch, or auto"
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return "they share a processor, and this machine computes on an accelerator", "accelerate launch, or auto"
    from accelerate.state import PartialState
    from threadpoolctl import threadpool_info

    anew = "run `graftwerk train`, or train before anything else computes in this process"
    if PartialState._shared_state:
        return "accelerate is in use in this process already", anew
    # Linear algebra outside of torch has threads from its import on, and knows how to be forked.
    idle = sum(pool["num_threads"] - 1 for pool in threadpool_info() if pool["user_api"] == "blas")
    if len(os.listdir("/proc/self/task")) > 1 + idle:
        return "threads of this process are at work or have been", anew
    return None


def _worth(settings: RunConfig, rows: int) -> int:
    from graftwerk.models.hardware import threads_wanted
    from graftwerk.models.load import load_config
    from graftwerk.train import memory

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
    fitting = int(FREE_SHARE * (memory.available() or 0) // (4 * COPIES * parameters))
    return max(1, min(count, fitting))


def _begun_with(checkpoints: Checkpoints) -> int | None:
    from graftwerk.store.safety import read_json
    from graftwerk.train.checkpoint import STATE

    for step in reversed(checkpoints.steps()):
        with suppress(GraftwerkError, OSError, KeyError, TypeError, ValueError):
            return int(read_json(checkpoints.path(step) / STATE)["processes"])
    return None


@contextmanager
def sharing(count: int, kept: Callable[[], str | None]) -> Iterator[None]:
    """Inside, ``count`` processes do the same, each with a rank of its own in the environment; helpers end with it.

    Args:
        count: With this one; 1: nothing happens.
        kept: What is safe when a helper dies, for the error.

    Raises:
        EnvironmentFault: a helper died (of memory, most likely), where that ended this process's work too.
    """
    if count == 1:
        yield
        return
    import torch

    from graftwerk.models.hardware import threads_wanted

    threads, before = torch.get_num_threads(), {name: os.environ.get(name) for name in _SET}
    each = max(1, threads_wanted() // count)
    reading, writing = os.pipe()
    helpers: list[int] = []
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as place:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        for rank in range(1, count):
            pid = os.fork()
            if pid == 0:
                with _helper(writing, parent):
                    _join(rank, count, place, each)
                    yield
            helpers.append(pid)
        os.close(writing)
        try:
            _join(0, count, place, each)
            yield
            _let_end(helpers)
        except GraftwerkError:
            raise
        except Exception as error:
            if (said := _last_words(helpers, reading)) is None:
                raise
            raise EnvironmentFault(
                f"a process that took part in the training ended: {said}",
                where=KEY,
                mend="training.processes=1 takes less memory",
                kept=kept(),
            ) from error
        finally:
            _end(helpers)
            os.close(reading)
            _leave()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            torch.set_num_threads(threads)


@contextmanager
def _helper(writing: int, parent: int) -> Iterator[None]:
    """What a forked process does in place of returning: nothing on the terminal, an end with its parent."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(code)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        yield
        code = 0
    except BaseException as error:
        with suppress(OSError):
            os.write(writing, f"{type(error).__name__}: {error}\n".encode()[:2000])
    finally:
        os._exit(code)


def _join(rank: int, count: int, place: str, threads: int) -> None:
    """Take part as ``rank``: what a launcher would have put into the environment, and a process group."""
    import torch.distributed

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{Path(place) / 'met'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(days=30),  # of waiting for one that lives: a dead one is noticed at once
    )


def _leave() -> None:
    """This process is alone again."""
    import torch.distributed
    from accelerate.state import AcceleratorState

    with suppress(Exception):  # what others did not live to see
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _let_end(helpers: list[int]) -> None:
    until = time.monotonic() + _ENDING_SECONDS
    while helpers and time.monotonic() < until:
        helpers[:] = [pid for pid in helpers if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.002)


def _end(helpers: list[int]) -> None:
    for pid in helpers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _last_words(helpers: list[int], reading: int) -> str | None:
    """How a helper ended; None where all are alive, so that they are not what is wrong."""
    until = time.monotonic() + 2.0
    ended: list[tuple[int, int]] = []
    while not ended and time.monotonic() < until:
        ended = [(pid, status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in helpers) if pid]
        time.sleep(0.01)
    if not ended:
        return None
    for pid, status in ended:
        helpers.remove(pid)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return f"{name}" + (", as the kernel sends when memory runs out" if name == "SIGKILL" else "")
    ready, _, _ = select.select([reading], [], [], 0)
    said = os.read(reading, 2000).decode(errors="replace").strip() if ready else ""
    return said.splitlines()[0] if said else "it did not say why"
