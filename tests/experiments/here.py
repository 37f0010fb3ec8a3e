"""Comparisons whose runs are made in the test's own process, which takes seconds less to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftwerk.experiments.job_runner import JobRunner
from graftwerk.experiments.jobs import perform


class InThisProcess(JobRunner):
    """In place of `graftwerk.experiments.job_runner.JobRunner`."""

    def run(self, job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        return perform(job, lambda message: on_event(message["event"]))
