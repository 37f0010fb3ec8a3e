"""Several job runners at once: each in a thread of its own, all stopped by a signal or by the first error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from graftwerk.experiments.job_runner import JobRunner, signals_to

Work = Callable[[JobRunner], bool]
"""One piece of work, done with a runner; False if nothing is left to do."""


class Workers:
    """Job runners, each with a process of its own. A context manager; processes start with the first job.

    Args:
        log: Where what the processes print goes.
        count: Number of runners; the cores are shared among them.
    """

    def __init__(self, log: Path, count: int) -> None:
        threads = None if count == 1 else max(1, (os.cpu_count() or 1) // count)
        self.runners = [JobRunner(log, threads) for _ in range(count)]
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self.runners:
            runner.__exit__(kind, error, trace)

    def do(self, work: Work) -> None:
        """Call `work` with every runner, again and again, until it says for each that nothing is left.

        Raises:
            RunInterrupted: A signal came; the jobs at work have saved.
            GraftwerkError: The first error of any; the jobs of the others have saved and ended.
        """
        self._error = None
        with signals_to(self.runners), ThreadPoolExecutor(len(self.runners)) as pool:
            wait([pool.submit(self._loop, runner, work) for runner in self.runners])
            if self._error is not None:
                raise self._error

    def _loop(self, runner: JobRunner, work: Work) -> None:
        try:
            while self._error is None:
                runner.check()
                if not work(runner):
                    return
        except BaseException as error:  # a defect must reach the main thread, too
            with self._lock:
                self._error = self._error or error
            for other in self.runners:
                if other is not runner:
                    other.end_job()
