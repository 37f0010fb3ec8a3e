"""Several job runners at once: each in a thread of its own, all stopped by a signal or by the first error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from graftwerk.errors import ConfigError
from graftwerk.experiments.job_runner import JobRunner, signals_to

Item = TypeVar("Item")
Work = Callable[[JobRunner], bool]
"""One piece of work, done with a runner; False if nothing is left to do."""


class Machines(Protocol):
    """Machines that jobs run on: this one, or those of a cluster (`ray_cluster.RayCluster`)."""

    at_once: int
    """Jobs at the same time."""

    def runners(self, log: Path, most: int | None = None) -> list[JobRunner]:
        """Return job runners; nothing is started before their first jobs."""


class ThisMachine:
    """Jobs on this machine, each in a process of its own; the cores are shared among those at once."""

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once

    def runners(self, log: Path, most: int | None = None) -> list[JobRunner]:
        """Return the job runners."""
        threads = None if self.at_once == 1 else max(1, (os.cpu_count() or 1) // self.at_once)
        return [JobRunner(log, threads) for _ in range(min(self.at_once, most or self.at_once))]


@contextmanager
def machines(
    ray: str | None, resources: str | Mapping[str, float] | None = None, at_once: int | None = None
) -> Iterator[Machines]:
    """Open the machines that jobs run on.

    Args:
        ray: Address of a Ray cluster, ``auto``, or ``local``; None means this machine.
        resources: What one job takes of a cluster: ``CPU=2,GPU=1``, or a mapping.
        at_once: Jobs at the same time. None: one, or as many as the cluster has room for.

    Raises:
        ConfigError: Resources without a cluster.
        ResourceError: Ray is not installed, cannot be reached, or has no room for a job.
    """
    if ray is None:
        if resources is not None:
            raise ConfigError("`resources` are those of a job on a Ray cluster", where="resources", hint="--ray auto")
        yield ThisMachine(at_once or 1)
        return
    from graftwerk.experiments.ray_cluster import RayCluster

    with RayCluster(ray, resources, at_once) as cluster:
        yield cluster


class Workers:
    """Job runners that work at once. A context manager that closes them."""

    def __init__(self, runners: Sequence[JobRunner]) -> None:
        self.runners = list(runners)
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            for runner in self.runners:
                stack.push(runner)

    def each(self, items: Iterable[Item], work: Callable[[JobRunner, Item], None]) -> None:
        """Call `work` with a runner for each of the items, in their order.

        Raises:
            GraftwerkError, RunInterrupted: As `do` does.
        """
        waiting, lock = iter(items), threading.Lock()

        def one(runner: JobRunner) -> bool:
            with lock:
                item = next(waiting, None)
            if item is None:
                return False
            work(runner, item)
            return True

        self.do(one)

    def do(self, work: Work) -> None:
        """Call `work` with every runner, again and again, until it says for each that nothing is left.

        One runner alone works in the thread of the caller.

        Raises:
            RunInterrupted: A signal came; the jobs at work have saved.
            GraftwerkError: The first error of any; the jobs of the others have saved and ended.
        """
        self._error = None
        with signals_to(self.runners):
            if len(self.runners) == 1:
                self._loop(self.runners[0], work)
            else:
                with ThreadPoolExecutor(len(self.runners)) as pool:
                    wait([pool.submit(self._loop, runner, work) for runner in self.runners])
            if self._error is not None:
                raise self._error

    def _loop(self, runner: JobRunner, work: Work) -> None:
        try:
            while self._error is None:
                runner.check()
                if not work(runner):
                    if len(self.runners) > 1:
                        runner.release()
                    return
        except BaseException as error:  # a defect must reach the main thread, too
            with self._lock:
                self._error = self._error or error
            for other in self.runners:
                if other is not runner:
                    other.end_job()
