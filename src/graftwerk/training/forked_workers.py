"""Processes that train together on a CPU: forked from this one before it has computed anything.

Small matrix products do not fill several threads: two processes of one thread each, which share a step's rows and add
their gradients, do more steps in the same time than one process of two threads (docs/decisions/0015). The processes
meet as launched ones do (`distributed/`); here they are only started and ended.

A worker is a fork, which shares what is imported and has no startup cost. Forking is safe as long as no thread is at
work: OpenMP's and the tokenizers' threads would be missing in the fork, which would wait for them; `num_processes`
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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

from graftwerk.errors import GraftwerkError, ResourceError
from graftwerk.training.distributed.launcher import rank_environment
from graftwerk.training.signals import SIGNALS, held_back

KEY = "training.processes"
_MEETING, _ENDING_SECONDS = timedelta(minutes=2), 30.0
_ENVIRONMENT = (*rank_environment(0, 1), "MASTER_PORT", "ACCELERATE_USE_CPU", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
"""Environment variables that are set here or by accelerate, and restored at the end."""
_PR_SET_PDEATHSIG = 1


def run_forked(job: Callable[[], None], num_processes: int, recoverable: Callable[[], str | None]) -> None:
    """Run a job in several processes at once, each with a rank of its own in the environment.

    Args:
        job: Function to run; this process is rank 0 and runs it too. In the forked workers it runs to its end and
            nothing after it does.
        num_processes: Number of processes, this one included; 1 just calls ``job``.
        recoverable: Function that returns the path of the newest checkpoint when a worker dies, for the error.

    Raises:
        ResourceError: No process can be forked, or a worker died (of memory, most likely) and this process's work
            failed for that reason.
    """
    if num_processes == 1:
        job()
        return
    import torch

    from graftwerk.models.hardware import threads_wanted

    threads, before = torch.get_num_threads(), {name: os.environ.get(name) for name in _ENVIRONMENT}
    threads_each, hook = max(1, threads_wanted() // num_processes), sys.excepthook
    workers: list[int] = []
    with ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="graftwerk-"))
        reading, writing = os.pipe()
        ends.callback(os.close, reading)
        ends.callback(_kill, workers)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

        def join_and_work(rank: int) -> None:
            _join(rank, num_processes, folder, threads_each)
            job()

        try:
            for rank in range(1, num_processes):
                with held_back():
                    workers.append(_fork(lambda rank=rank: join_and_work(rank), writing))  # type: ignore[misc]
        except OSError as error:
            raise ResourceError(
                f"no process can be forked: {error.strerror or error}",
                where=KEY,
                hint=f"{KEY}=1",
                recovered=recoverable(),
            ) from error
        finally:
            os.close(writing)
        try:
            join_and_work(0)
            _wait_for_end(workers)
        except RuntimeError as error:
            cause = None if isinstance(error, GraftwerkError) else _cause(error, workers, reading)
            if cause is None:
                raise
            raise ResourceError(
                f"a process that took part in the training ended: {cause}",
                where=KEY,
                hint=f"{KEY}=1 takes less memory",
                recovered=recoverable(),
            ) from error
        finally:
            _leave()
            sys.excepthook = hook  # torch puts the rank before every traceback, and leaves it there
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            torch.set_num_threads(threads)


def _fork(work: Callable[[], None], writing: int) -> int:
    """Run ``work`` in a fork, which never returns, and return its process id.

    The fork prints nothing and ends with its parent; an error is written into the pipe ``writing``.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the main process, which tells the others
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(code)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        work()
        code = 0
    except BaseException as error:
        with suppress(OSError):
            os.write(writing, f"{type(error).__name__}: {error}\n".encode()[:2000])
    finally:
        os._exit(code)


def _join(rank: int, world_size: int, folder: str, threads: int) -> None:
    """Take part as ``rank``: set the environment that a launcher sets, and join the process group."""
    import torch.distributed

    os.environ |= rank_environment(rank, world_size)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(threads)}
    store = torch.distributed.FileStore(str(Path(folder) / "met"), world_size)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_MEETING)
    # From here on a process that dies is noticed at once, and one that lives may take its time.
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(days=30))


def _leave() -> None:
    """Leave the process group."""
    import torch.distributed
    from accelerate.state import AcceleratorState

    with suppress(Exception):  # the group may be broken by a process that died
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def end_with_parent(signum: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def ended(pid: int, *, wait: bool = False) -> int | None:
    """Return the wait status of a child that has ended.

    Returns:
        The status, 0 if another caller has taken it, None if the child is alive.
    """
    try:
        found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if found else None


def _wait_for_end(workers: list[int]) -> None:
    until = time.monotonic() + _ENDING_SECONDS
    while workers and time.monotonic() < until:
        workers[:] = [pid for pid in workers if ended(pid) is None]
        time.sleep(0.002)


def _kill(workers: list[int]) -> None:
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ended(pid, wait=True)


def _cause(error: RuntimeError, workers: list[int], reading: int) -> str | None:
    """Return how a worker ended if that is why this process failed, None if this process failed by itself.

    A worker counts if a signal ended it, or if it ended with another error than this process.
    """
    until = time.monotonic() + 2.0
    statuses: dict[int, int] = {}
    while not statuses and time.monotonic() < until:
        statuses = {pid: status for pid in workers if (status := ended(pid)) is not None}
        time.sleep(0.01)
    workers[:] = [pid for pid in workers if pid not in statuses]
    for status in statuses.values():
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return name + (", as the kernel sends when memory runs out" if name == "SIGKILL" else "")
    lost_contact = any(word in str(error).lower() for word in ("gloo", "timeout"))
    if not lost_contact or not any(statuses.values()):  # what went wrong here went wrong there as well
        return None
    ready, _, _ = select.select([reading], [], [], 0)
    text = os.read(reading, 2000).decode(errors="replace").strip() if ready else ""
    return text.splitlines()[0] if text else "for no reason that it gave"
