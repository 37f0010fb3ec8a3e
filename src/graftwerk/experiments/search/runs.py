"""The runs of a search: their settings, their training in a worker, their progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.experiments.eta import EtaEstimator
from graftwerk.experiments.job_runner import JobRunner
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.run_events import NOTED, RunEvents
from graftwerk.training.run_dir import TRUNK, read_manifest

Listener = Callable[[ProgressEvent], None]
REMARKS = frozenset({"diagnosis"})
"""Events of a run that its own report shows: a search has many runs, and most of their settings are poor."""


@dataclass
class Active:
    """A run at work.

    Attributes:
        label: Its name for people.
        began: When it did, by `time.monotonic`.
        progress: Its steps.
        rows: Score of each validation row at the last evaluation, if they are asked for.
        ended: True if it was asked to end.
        lacks: Bytes of memory that it lacks by its plan, so that it was refused before its training.
    """

    label: str
    began: float = field(default_factory=time.monotonic)
    progress: RunEvents = field(default_factory=RunEvents)
    rows: list[float] | None = None
    ended: bool = False
    lacks: int = 0


class Runs:
    """The settings, the display and the training that all runs of a search share.

    Args:
        base: Their settings; its `output_dir` is the folder of the search.
        planned: Kind of each run that is planned, in order, for the time that is left; [] if that is not known.
        workers: Number of runs at once.
        listener: Called with every progress event.

    Attributes:
        lock: Held while the study or the display is used.
    """

    def __init__(self, base: RunConfig, planned: list[str], workers: int, listener: Listener) -> None:
        self.base, self.folder, self.workers, self.listener = base, base.output_dir, workers, listener
        self.tree = base.model_dump(mode="json")
        self.lock = threading.RLock()
        self.eta = EtaEstimator(planned)
        self.total = len(planned)

    def config_of(self, settings: Mapping[str, Any], folder: str, seed: int | None = None) -> RunConfig:
        """Return the settings of one run.

        Args:
            settings: Values of the axes, or {} for the run file as it is.
            folder: Its folder, below that of the search.
            seed: Its seed, or None for that of the run file.
        """
        seeded = {} if seed is None else {"training.seed": seed}
        return RunConfig.build(self.tree, {**settings, **seeded, "output_dir": str(self.folder / folder)})

    def train(
        self,
        runner: JobRunner,
        config: RunConfig,
        active: Active,
        *,
        rows: bool = False,
        gives_up: Callable[[Mapping[str, Any]], bool] = lambda event: False,
    ) -> None:
        """Train one run, or resume it, and pass its events on.

        Args:
            runner: Runner of the job.
            config: Settings of the run.
            active: Its progress.
            rows: True if the score of each validation row is asked for.
            gives_up: Called with each evaluation; True ends the run.

        Raises:
            RunInterrupted: A signal came, or the run was given up.
            GraftwerkError: What the training raised.
        """

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "rows":
                active.rows = event["rows"]
                return
            if event["kind"] == "unfit":
                active.lacks = event["needed_bytes"] - event["available_bytes"]
                return
            with self.lock:
                if event["kind"] == "evaluation" and not active.ended and gives_up(event):
                    active.ended = True
                    runner.end_job()
                text = active.progress.update(event)
                kind = "note" if event["kind"] in NOTED - REMARKS else "phase" if event["kind"] == "phase" else "step"
                left = self.left(time.monotonic() - active.began, active.progress.left_seconds)
                self.emit(kind, active.label, text, active.progress.step, active.progress.steps, left)

        job = {"kind": "trial", "config": config.model_dump(mode="json"), "rows": rows}
        runner.run({**job, "trunk": str(self.folder / TRUNK)}, on_event)

    def validation_value(self, folder: str, metric: str) -> float | None:
        """Return a metric of a finished run on its validation rows, or None if it is undefined."""
        manifest = read_manifest(self.folder / folder) or {}
        value = manifest.get("metrics", {}).get("validation", {}).get(metric, {}).get("value")
        return None if value is None else float(value)

    def left(self, elapsed: float = 0.0, steps_left: float | None = None) -> float | None:
        """Return the estimated seconds to the end of all runs, or None if it is not known."""
        left = self.eta.left(elapsed, steps_left) if self.total else None
        return None if left is None else left / self.workers

    def emit(
        self, kind: Any, run: str = "", text: str = "", step: int = 0, steps: int = 0, left: float | None = None
    ) -> None:
        """Tell the listener; a search that its seconds end has one run more than were done, as far as is known."""
        total = self.total or self.eta.done + 1
        self.listener(ProgressEvent(kind, self.eta.done, total, run, text, step, steps, left))
