"""Comparisons whose runs are made in the test's own process, which takes seconds less to start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from graftwerk.experiments.jobs import perform


class InThisProcess:
    """In place of `graftwerk.experiments.job_runner.JobRunner`."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def run(self, job: dict[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        return perform(job, lambda message: on_event(message["event"]))
