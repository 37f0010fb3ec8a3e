"""Jobs for the process of `fork_server.py`: pass on their events, and raise their errors as they were raised there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from graftwerk import errors
from graftwerk.errors import ErrorReport, GraftwerkError, ResourceError, RunInterrupted
from graftwerk.experiments.fork_server import CAN_FORK
from graftwerk.machine import compact_malloc
from graftwerk.own_files import open_own
from graftwerk.training.signals import handled_by

CLOSE_SECONDS = 60
LOG_TAIL = 12
"""Lines of the log that are quoted when a worker dies without a word."""

OnEvent = Callable[[dict[str, Any]], None]


class Crashed(ResourceError):  # noqa: N818
    """A worker died without saying why: killed by the system, most likely for want of memory."""

    code = "crashed"


_BY_CODE = {
    kind.code: kind
    for kind in (*vars(errors).values(), Crashed)
    if isinstance(kind, type) and issubclass(kind, GraftwerkError)
}


class JobRunner:
    """One job at a time, each in a process of its own. A context manager; nothing is started before the first job.

    SIGINT and SIGTERM are passed on to the job at work, which saves and ends; then `RunInterrupted` is raised here.

    Args:
        log: Where what the processes print goes; begun anew.
        threads: Threads of the processes, or None for what they choose.
    """

    def __init__(self, log: Path, threads: int | None = None) -> None:
        self.log, self.threads = log, threads
        self.signum: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._job: int | None = None
        self._ending = False
        self._lock = threading.Lock()  # a job gets one signal: a second one would stop it at once

    def __enter__(self) -> JobRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def run(self, job: Mapping[str, Any], on_event: OnEvent) -> dict[str, Any]:
        """Do a job.

        Raises:
            GraftwerkError: what the job raised.
            Crashed: its process died.
            RunInterrupted: a signal came, or the job was asked to end; what it had is saved.
        """
        with signals_to([self]), self._ended_at_most_once():
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write((json.dumps(job, default=str) + "\n").encode())
                process.stdin.flush()
            except BrokenPipeError:
                raise self._crashed(process.wait()) from None
            return self._listen(process, on_event)

    def _listen(self, process: subprocess.Popen[bytes], on_event: OnEvent) -> dict[str, Any]:
        assert process.stdout is not None
        result: dict[str, Any] | None = None
        error: ErrorReport | None = None
        for line in process.stdout:
            message = json.loads(line)
            if "started" in message:
                with self._lock:
                    self._job, ending = message["started"], self._ending
                if (signum := self.signum or (signal.SIGTERM if ending else None)) is not None:
                    self._pass_on(signum)  # it came before there was a job to pass it on to
            elif "event" in message:
                on_event(message["event"])
            elif "done" in message:
                result = message["done"]
            elif "error" in message:
                error = rebuilt(message["error"])
            else:
                self._job = None
                if not CAN_FORK:
                    self._close()
                if self.signum is not None:
                    raise self._stopped(self.signum, kept=error.recovered if error is not None else None)
                if error is not None:
                    raise error
                if result is None:
                    raise self._crashed(message["ended"])
                return result
        raise self._crashed(process.wait())

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **compact_malloc(), "PYTHONUNBUFFERED": "1"}
            if self.threads is not None:
                environment.setdefault("OMP_NUM_THREADS", str(self.threads))
            with os.fdopen(open_own(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "graftwerk.experiments.fork_server"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and is passed on once
                )
        return self._process

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _crashed(self, code: int) -> Crashed:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        if code == -signal.SIGKILL:
            return Crashed(
                "the process of this run was killed (SIGKILL), most likely because memory ran out",
                where=str(self.log),
                hint="fewer rows in training.per_device_train_batch_size, gradient_checkpointing, or a smaller model",
            )
        said = "\n".join(lines[-LOG_TAIL:])
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return Crashed(
            f"the process of this run ended ({how}) without a result" + (f":\n{said}" if said else ""),
            where=str(self.log),
        )

    def check(self) -> None:
        """Raise RunInterrupted if a signal has come."""
        if self.signum is not None:
            raise self._stopped(self.signum)

    def interrupt(self, signum: int) -> None:
        """Pass a signal on to the job at work, and start no further one."""
        self.signum = signum
        self._pass_on(signum)

    def end_job(self) -> None:
        """Ask the job to save and end, as SIGTERM would; `run` then raises the RunInterrupted of the job.

        That is the job at work, as soon as its process has started, or the next one if there is none.
        """
        with self._lock:
            asked, self._ending = self._ending, True
            at_work = self._job is not None
        if at_work and not asked:
            self._pass_on(signal.SIGTERM)

    def release(self) -> None:
        """Give back what other runners may need while there is nothing to do here: nothing, on one machine."""

    @contextmanager
    def _ended_at_most_once(self) -> Iterator[None]:
        """Do nothing of a job that was asked to end before it began; forget afterwards that it was asked to."""
        try:
            self._check_wanted()
            yield
        finally:
            self._ending = False

    def _check_wanted(self) -> None:
        """Raise RunInterrupted if a signal has come or the job was asked to end."""
        self.check()
        if self._ending:
            raise self._stopped(signal.SIGTERM)

    def _stopped(self, signum: int, kept: str | None = None) -> RunInterrupted:
        return RunInterrupted(signum, f"stopped by {signal.Signals(signum).name}", recovered=kept)

    def _pass_on(self, signum: int) -> None:
        if self._job is not None:
            with suppress(ProcessLookupError):
                os.kill(self._job, signum)


@contextmanager
def signals_to(runners: Sequence[JobRunner]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the jobs of all runners; outside the main thread nothing is installed.

    Raises:
        RunInterrupted: At the end, if a signal came and no job has raised it.
    """

    def on_signal(signum: int, frame: FrameType | None) -> None:
        for runner in runners:
            runner.interrupt(signum)

    with handled_by(on_signal):
        yield
    if threading.current_thread() is not threading.main_thread():
        return
    for runner in runners:  # it came when the job had ended
        runner.check()


def rebuilt(said: Mapping[str, Any]) -> ErrorReport:
    """Return the error that a worker raised, with the same class."""
    what, where, hint, kept = (said.get(part) for part in ("what", "where", "hint", "recovered"))
    if said.get("error") == RunInterrupted.code:
        return RunInterrupted(int(said["exit_code"]) - 128, str(what), recovered=kept, hint=hint)
    return _BY_CODE.get(str(said.get("error")), GraftwerkError)(str(what), where=where, hint=hint, recovered=kept)
