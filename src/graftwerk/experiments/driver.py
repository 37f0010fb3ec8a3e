"""One comparison from its folder's lock to its result: trials, runs, failures, and progress events.

The driver of `compare` and of `ablate`. Every run is a job in a process of its own (`job_runner.py`); a run that is
finished is loaded instead, so that a stopped comparison resumes.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import (
    ConflictError,
    DivergedError,
    ErrorReport,
    IntegrityError,
    MemoryShortage,
    RunInterrupted,
)
from graftwerk.experiments.aggregation import RunResult, TrialResult, aggregate, measured_run, trained_trial
from graftwerk.experiments.arguments import VARY, check_vary, refuse_overrides
from graftwerk.experiments.budget import Budget, Trials, candidates, describe_budget, tuning_seed
from graftwerk.experiments.comparison import COMPARISON, COMPARISON_SCALE
from graftwerk.experiments.eta import EtaEstimator
from graftwerk.experiments.factors import Ablation
from graftwerk.experiments.header import CONFIG, comparison_header
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.method_specs import MethodSpec, with_and_without
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.run_events import NOTED, RunEvents, result_line
from graftwerk.experiments.run_results import RunResults
from graftwerk.experiments.tuning import chosen, describe_tuning, method_of, planned_runs, read_axes, tuned
from graftwerk.experiments.workers import Machines, Workers
from graftwerk.own_files import refuse_links
from graftwerk.reporting.files import SEARCH
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.training.lock import RunLock
from graftwerk.training.run_dir import LOCK, MANIFEST, REPORT, TRUNK, read_manifest

LOG = "workers.log"

Listener = Callable[[ProgressEvent], None]


class ComparisonDriver:
    """Run one comparison: its planned runs, their results and failures, and progress events."""

    def __init__(
        self,
        config: RunConfig | str | Path | Mapping[str, Any],
        specs: list[MethodSpec],
        seeds: list[int],
        overrides: Mapping[str, Any],
        augment: Sequence[str] | str | None,
        *,
        listener: Listener,
        budget: Budget | None = None,
        ablation: Ablation | None = None,
        vary: str = VARY[0],
    ) -> None:
        tree, where = RunConfig.content(config)
        refuse_overrides(overrides)
        self.ablation, self.vary = ablation, check_vary(vary)
        self.axes, others = read_axes(overrides)
        base = RunConfig.build(
            tree if ablation else {**tree, "method": specs[0].method},
            others,
            where=where,
        ).anchored()
        self.run_file_method = tree.get("method")
        specs = with_and_without(specs, augment, bool(base.data.augment))
        self.base, self.seeds, self.augment = base, seeds, augment
        self.methods, self.budget = specs, budget
        self.specs = tuned(specs, self.axes) if budget is None else []
        self.trials: Trials | None = None
        self.eta = EtaEstimator([method_of(spec) for _ in seeds for spec in self.specs or specs])
        if budget is not None:
            tries = {spec.name: candidates(spec, base, self.axes, budget) for spec in specs}
            self.specs = [spec for each in tries.values() for spec in each]
            self.trials = Trials(tries, budget, tuning_seed(seeds))
            self.eta.planned[:0] = [method_of(spec) for spec in self.specs if self.trials.number is not None]
        self.folder = base.output_dir
        self.listener = listener
        self.lock, self.at_once = threading.RLock(), 1
        names = [spec.name for spec in self.specs]
        self.tries, self.finals = RunResults[TrialResult](names), RunResults[RunResult](names)
        self.ranked: list[MethodSpec] = []
        self.tuning: list[dict[str, Any]] = []

    def config_of(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        """Return the resolved settings of one run, as plain values."""
        tree = spec.changed(self.base.model_dump(mode="json"))
        tree["training"]["seed"] = seed
        if self.vary == "split":
            tree["data"]["train_seed"] = seed
        tree["output_dir"] = str(self.folder_of(spec, seed))
        return tree

    def folder_of(self, spec: MethodSpec, seed: int) -> Path:
        """Return the folder of one run."""
        return self.folder / f"{spec.name}-seed{seed}"

    def run(
        self,
        machines: Machines,
        *,
        overwrite: bool,
        metric: str | None,
        prefer: str,
        margin: float | None,
    ) -> None:
        """Make what is left of the comparison, and write its result.

        Args:
            machines: Where the jobs run.
            overwrite: Train all runs again.
            metric: The metric that decides, or None for the task's own.
            prefer: The cost that the recommendation minimises.
            margin: Distance from the best mean that counts as near it, or None for the default.

        Raises:
            ConflictError: The folder is in use, or holds other runs.
            GraftwerkError: As `compare` does.
        """
        for name, what in ((MANIFEST, "a run"), (SEARCH, "a search")):
            if (self.folder / name).exists():
                hint = "give the comparison another one: output_dir=runs/comparison"
                raise ConflictError(f"{self.folder} is the folder of {what}", hint=hint)
        runs = [self.folder_of(spec, seed).name for spec, seed in self._all_runs()]
        refuse_links(self.folder, (LOCK, COMPARISON, CONFIG, LOG, REPORT, TRUNK, *runs))
        most = len(self.eta.planned) or None  # None: of a budget of time
        with RunLock(self.folder), Workers(machines.runners(self.folder / LOG, most)) as workers:
            self.at_once = len(workers.runners)
            planned = planned_runs(self.methods, self.axes, self.seeds, self.budget)
            self._emit("note", text=self.ablation.planned(self.seeds) if self.ablation else planned)
            header = self._check(workers, overwrite, metric, prefer, margin)
            self._write({**header, "status": "running", "methods": [], "differences": [], "seconds": None})
            write_file(self.folder / CONFIG, self.base.dump(), own=True)
            self._run_all(workers, header["metric"], overwrite)
            self._finish(header, prefer, margin)

    def _check(
        self, workers: Workers, overwrite: bool, metric: str | None, prefer: str, margin: float | None
    ) -> dict[str, Any]:
        """Check rows, models and methods before any training, and return the header of `comparison.json`."""
        try:
            checked = self._checked(workers, overwrite)
            return comparison_header(
                self.base, self.methods, self.seeds, self.augment, metric, checked,
                prefer=prefer, margin=margin, own=self.run_file_method, axes=self.axes, budget=self.budget,
                ablation=self.ablation, vary=self.vary,
            )  # fmt: skip
        except ErrorReport as error:
            if not isinstance(error, Crashed) and not (self.folder / COMPARISON).exists():
                (self.folder / LOG).unlink(missing_ok=True)  # so that a comparison that never began leaves nothing
            raise

    def _checked(self, workers: Workers, overwrite: bool) -> dict[str, Any]:
        first = self.seeds[0]
        existing = [] if overwrite else [planned for planned in self._all_runs() if self.folder_of(*planned).is_dir()]
        # of those that differ only in settings of the training, one will do
        different = {(method_of(spec), str(spec.method)): spec for spec in reversed(self.specs)}.values()
        job = {
            "kind": "check",
            "configs": {spec.name: self.config_of(spec, first) for spec in reversed([*different])},
            "runs": {str(self.folder_of(*planned)): self.config_of(*planned) for planned in existing},
        }
        return workers.runners[0].run(job, lambda event: self._emit("phase", "", event.get("name", "")))

    def _all_runs(self) -> list[tuple[MethodSpec, int]]:
        """Return every run that the comparison might make."""
        seeds = self.seeds if self.trials is None else [*self.seeds, self.trials.seed]
        return [(spec, seed) for seed in seeds for spec in self.specs]

    def _run_all(self, workers: Workers, metric: str, overwrite: bool) -> None:
        """Make the trials, choose among them, and make the runs that are reported."""

        def run(runner: JobRunner, planned: tuple[MethodSpec, int]) -> None:
            self._run_one(runner, *planned, metric, overwrite, trial=bool(planned[0].tried_for))

        def finish(runner: JobRunner, planned: tuple[MethodSpec, int]) -> None:
            # without a budget it is trained already: what is left is to measure the test rows
            more = overwrite and self.trials is not None
            self._run_one(runner, *planned, metric, more, counted=self.trials is not None)

        try:
            if self.trials is not None:
                workers.do(partial(self._next_trial, trials=self.trials, metric=metric, overwrite=overwrite))
                self.specs = self.trials.made
            else:
                workers.each(self._all_runs(), run)
            self.tries.sort()
            self.ranked, self.tuning = chosen(self.specs, self.tries.found, self.tries.failed, metric)
            left = [(spec, seed) for seed in self.seeds for spec in self.ranked if spec.tried_for]
            if self.trials is None:
                for spec, seed in left:
                    if seed not in self.tries.found[spec.name]:
                        self.finals.failed[spec.name][seed] = self.tries.failed[spec.name][seed]
                left = [(spec, seed) for spec, seed in left if seed in self.tries.found[spec.name]]
            workers.each(left, finish)
            self.finals.sort()
        except ErrorReport as error:
            # without a budget, a trial that is chosen is a reported run as well
            finished = self.tries.num_found + (0 if self.axes and not self.budget else self.finals.num_found)
            failed = self.tries.num_failed + self.finals.num_failed
            failures = f" ({failed} failed)" if failed else ""
            error.recovered = f"{finished} of {len(self.eta.planned)} runs{failures} in {self.folder}"
            if isinstance(error, RunInterrupted):
                error.hint = "run the same command again to resume"
            raise

    def _next_trial(self, runner: JobRunner, *, trials: Trials, metric: str, overwrite: bool) -> bool:
        """Make a trial of the method whose turn it is; False if each has spent its budget or tried all there is."""
        with self.lock:
            spec = trials.next()
            if spec is None:
                return False
            if trials.number is None:
                self.eta.planned.insert(self.eta.done, spec.tried_for)
        began = time.monotonic()
        self._run_one(runner, spec, trials.seed, metric, overwrite, trial=True)
        found = read_manifest(self.folder_of(spec, trials.seed)) or {}
        seconds = found.get("cost", {}).get("training_seconds")
        with self.lock:
            trials.done(spec, time.monotonic() - began if seconds is None else seconds)
        return True

    def _finish(self, header: Mapping[str, Any], prefer: str, margin: float | None) -> None:
        """Aggregate the results and write them below the header."""
        result = aggregate(
            self.ranked,
            self.finals.found,
            self.finals.failed,
            metric=header["metric"],
            confidence=self.base.evaluation.confidence,
            resamples=self.base.evaluation.resamples,
            prefer=prefer,
            margin=margin,
            ablation=self.ablation,
        )
        made: list[TrialResult] = [*self.tries, *self.finals]
        folders = {run.folder: run.manifest["cost"].get("training_seconds") or 0.0 for run in made}
        seconds = sum(folders.values())
        notes = [*filter(None, [result.get("at_chance")]), *describe_tuning(self.tuning), *header["notes"]]
        if self.tuning:
            result["tuning"] = self.tuning
        if self.trials is not None:
            result["budget"] = self.trials.summary(self.tries.failed)
            notes.insert(0, describe_budget(result["budget"]))
        shutil.rmtree(self.folder / TRUNK, ignore_errors=True)  # hidden states shared by runs on the same layers
        self._write({**header, "notes": notes, **result, "status": "finished", "seconds": seconds})
        self._emit("end", text="done")

    # -- one run -----------------------------------------------------------------------------------------------------

    def _run_one(
        self,
        runner: JobRunner,
        spec: MethodSpec,
        seed: int,
        metric: str,
        overwrite: bool,
        *,
        trial: bool = False,
        counted: bool = True,
    ) -> None:
        """Make one run unless there is its result.

        Args:
            runner: Runs it.
            spec: Its method.
            seed: Its seed.
            metric: Name of the metric that decides.
            overwrite: Train again what is there.
            trial: Measure validation rows alone, for the choice among several.
            counted: It is a run of its own, not the rest of one that was counted as a trial.
        """
        folder = self.folder_of(spec, seed)
        run_label = f"{spec.name}, seed {seed}"
        failed = self.tries.failed if trial else self.finals.failed
        manifest = None if overwrite else read_manifest(folder)
        if manifest is not None:
            if (found := self._loaded(spec, seed, trial)) is not None:
                with self.lock:
                    if not counted:
                        return
                    self.eta.finished(method_of(spec), None)
                    self._emit("note", run_label, f"already finished: {result_line(found, metric)}")
                return
            if manifest["status"] == "diverged":
                self._record_failure(spec, seed, str((manifest.get("error") or {}).get("what", "diverged")), failed)
                return
        began = time.monotonic()
        progress = RunEvents()

        def on_event(event: dict[str, Any]) -> None:
            text = progress.update(event)
            kind = "note" if event["kind"] in NOTED else "phase" if event["kind"] == "phase" else "step"
            elapsed = time.monotonic() - began
            with self.lock:
                left = self._left(elapsed, progress.left_seconds) if counted else None
                if counted or kind != "note":  # that it resumes is no news
                    self._emit(kind, run_label, text, progress.step, progress.steps, left)

        try:
            job = {"kind": "run", "config": self.config_of(spec, seed), "overwrite": overwrite, "trial": trial}
            runner.run({**job, "trunk": str(self.folder / TRUNK)}, on_event)
        except (DivergedError, Crashed, MemoryShortage) as error:
            self._record_failure(spec, seed, error.what, failed)
            return
        found = self._loaded(spec, seed, trial)
        if found is None:
            raise IntegrityError(f"the run {folder} ended without a result", where=str(folder))
        with self.lock:
            if counted:
                self.eta.finished(method_of(spec), time.monotonic() - began)
            self._emit("run", run_label, result_line(found, metric), left=self._left())

    def _loaded(self, spec: MethodSpec, seed: int, trial: bool) -> TrialResult | None:
        """Load and remember the result of a run, or return None if there is none yet."""
        folder = self.folder_of(spec, seed)
        if trial:
            if (tried := trained_trial(folder)) is not None:
                self.tries.found[spec.name][seed] = tried
            return tried
        if (found := measured_run(folder)) is not None:
            self.finals.found[spec.name][seed] = found
        return found

    def _record_failure(self, spec: MethodSpec, seed: int, reason: str, failed: dict[str, dict[int, str]]) -> None:
        with self.lock:
            failed[spec.name][seed] = reason
            self.eta.finished(method_of(spec), None)
            self._emit("note", f"{spec.name}, seed {seed}", f"failed: {reason}", left=self._left())

    def _left(self, elapsed: float = 0.0, steps_left: float | None = None) -> float | None:
        """Return the seconds left, or None while nobody can say how many trials a budget of time allows."""
        if self.trials is not None and self.trials.number is None and not self.ranked:
            return None
        left = self.eta.left(elapsed, steps_left)
        return None if left is None else left / self.at_once

    # -- output ------------------------------------------------------------------------------------------------------

    def _write(self, result: Mapping[str, Any]) -> None:
        path = self.folder / COMPARISON
        write_file(path, dump_object(redacted(result), path, room=COMPARISON_SCALE, seal=True), own=True)

    def _emit(
        self, kind: Any, run: str = "", text: str = "", step: int = 0, steps: int = 0, left: float | None = None
    ) -> None:
        self.listener(ProgressEvent(kind, self.eta.done, len(self.eta.planned), run, text, step, steps, left))
