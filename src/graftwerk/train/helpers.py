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
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
_MEETING, _ENDING_SECONDS = timedelta(minutes=2), 30.0
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
    rows = settings.training.per_device_train_batch_size * settings.training.gradient_accumulation_steps
    if asked == "auto":
        count = (_begun_with(checkpoints) if resume else None) or _of_environment() or _worth(settings, rows)
        return count if 1 < count <= rows and _against() is None else 1
    if asked > rows:
        raise ConfigError(f"{asked} processes cannot share a step's {rows} rows", where=KEY, mend=f"at most {rows}")
    if asked > 1 and (against := _against()):
        raise UnsupportedError(f"{asked} processes cannot be begun here: {against[0]}", where=KEY, mend=against[1])
    return asked


def _of_environment() -> int | None:
    given = os.environ.get(ENVIRONMENT, "")
    if not given:
        return None
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{given!r} is no number of processes", where=ENVIRONMENT, mend="1, 2, ...")
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
    """Whether this process has one thread.

    The linear algebra of numpy and scipy starts threads when it is imported, which idle; at any fork it ends them, in
    the parent too, and starts them again when they are needed. So a fork that ends at once leaves those that matter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what is to be found
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    _ended(pid, wait=True)
    for _ in range(20):
        try:
            if len(os.listdir("/proc/self/task")) == 1:
                return True
        except OSError:
            return False
        time.sleep(0.002)
    return False


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
            state = read_json(checkpoints.path(step) / STATE)
            return int(state["processes"]) if state.get("sharing") else 1  # launched ones are launched again
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
    each, hook = max(1, threads_wanted() // count), sys.excepthook
    helpers: list[int] = []
    with ExitStack() as ends:
        place = ends.enter_context(tempfile.TemporaryDirectory(prefix="graftwerk-"))
        reading, writing = os.pipe()
        ends.callback(os.close, reading)
        ends.callback(_end, helpers)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        try:
            for rank in range(1, count):
                pid = os.fork()
                if pid == 0:
                    with _helper(writing, parent):
                        _join(rank, count, place, each)
                        yield
                helpers.append(pid)
        except OSError as error:
            raise EnvironmentFault(
                f"no process can be forked: {error.strerror or error}", where=KEY, mend=f"{KEY}=1", kept=kept()
            ) from error
        finally:
            os.close(writing)
        try:
            _join(0, count, place, each)
            yield
            _let_end(helpers)
        except RuntimeError as error:
            said = None if isinstance(error, GraftwerkError) else _cause(error, helpers, reading)
            if said is None:
                raise
            raise EnvironmentFault(
                f"a process that took part in the training ended: {said}",
                where=KEY,
                mend=f"{KEY}=1 takes less memory",
                kept=kept(),
            ) from error
        finally:
            _leave()
            sys.excepthook = hook  # torch puts the rank before every traceback, and leaves it there
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
        os.setpgid(0, 0)  # Ctrl-C is for the main process, which tells the others
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
    store = torch.distributed.FileStore(str(Path(place) / "met"), count)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_MEETING)
    # Later on, one that dies is noticed at once, and one that lives may take its time.
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(days=30))


def _leave() -> None:
    """This process is alone again."""
    import torch.distributed
    from accelerate.state import AcceleratorState

    with suppress(Exception):  # what others did not live to see
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _ended(pid: int, *, wait: bool = False) -> int | None:
    """The wait status of a child that has ended; 0 where somebody else has taken it; None where it lives."""
    try:
        found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if found else None


def _let_end(helpers: list[int]) -> None:
    until = time.monotonic() + _ENDING_SECONDS
    while helpers and time.monotonic() < until:
        helpers[:] = [pid for pid in helpers if _ended(pid) is None]
        time.sleep(0.002)


def _end(helpers: list[int]) -> None:
    for pid in helpers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _ended(pid, wait=True)


def _cause(error: RuntimeError, helpers: list[int], reading: int) -> str | None:
    """How a helper ended, if that is why this process failed: by a signal, or with another error than this one's."""
    until = time.monotonic() + 2.0
    ended: dict[int, int] = {}
    while not ended and time.monotonic() < until:
        ended = {pid: status for pid in helpers if (status := _ended(pid)) is not None}
        time.sleep(0.01)
    helpers[:] = [pid for pid in helpers if pid not in ended]
    for status in ended.values():
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return name + (", as the kernel sends when memory runs out" if name == "SIGKILL" else "")
    missed = any(word in str(error).lower() for word in ("gloo", "timeout"))
    if not missed or not any(ended.values()):  # what went wrong here went wrong there as well
        return None
    ready, _, _ = select.select([reading], [], [], 0)
    said = os.read(reading, 2000).decode(errors="replace").strip() if ready else ""
    return said.splitlines()[0] if said else "it did not say why"
