"""Processes that train together on a processor: forked from this one before it has computed anything.

Small matrix products do not fill several threads: two processes of one thread each, which share a step's rows and add
their gradients, do more steps in the same time than one process of two threads (docs/decisions/0015). What the
processes do is what `accelerate launch` would have them do (`launch.py`); here they are only begun and ended.

A helper is a fork, which shares what is imported and costs no start of its own. Forking is safe as long as no thread
is at work: OpenMP's and the tokenizers' threads would be missing in the fork, which would wait for them; `how_many.py`
sees to that. The processes meet through a file in a private folder and talk over the loopback interface: no port is
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
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from graftwerk.errors import EnvironmentFault, GraftwerkError
from graftwerk.train.signals import SIGNALS, held_back

KEY = "training.processes"
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
                with held_back():
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        end_with_parent(signal.SIGKILL)
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


def end_with_parent(signum: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def ended(pid: int, *, wait: bool = False) -> int | None:
    """The wait status of a child that has ended; 0 where somebody else has taken it; None where it lives."""
    try:
        found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if found else None


def _let_end(helpers: list[int]) -> None:
    until = time.monotonic() + _ENDING_SECONDS
    while helpers and time.monotonic() < until:
        helpers[:] = [pid for pid in helpers if ended(pid) is None]
        time.sleep(0.002)


def _end(helpers: list[int]) -> None:
    for pid in helpers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ended(pid, wait=True)


def _cause(error: RuntimeError, helpers: list[int], reading: int) -> str | None:
    """How a helper ended, if that is why this process failed: by a signal, or with another error than this one's."""
    until = time.monotonic() + 2.0
    over: dict[int, int] = {}
    while not over and time.monotonic() < until:
        over = {pid: status for pid in helpers if (status := ended(pid)) is not None}
        time.sleep(0.01)
    helpers[:] = [pid for pid in helpers if pid not in over]
    for status in over.values():
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return name + (", as the kernel sends when memory runs out" if name == "SIGKILL" else "")
    missed = any(word in str(error).lower() for word in ("gloo", "timeout"))
    if not missed or not any(over.values()):  # what went wrong here went wrong there as well
        return None
    ready, _, _ = select.select([reading], [], [], 0)
    said = os.read(reading, 2000).decode(errors="replace").strip() if ready else ""
    return said.splitlines()[0] if said else "it did not say why"
