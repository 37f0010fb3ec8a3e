"""One sequence from its folder's lock to its result: every task of every variant and seed is an ordinary run.

A run after the first starts from the weights of the one before, and measures the tasks before it (`evaluation.retained`
names their runs). Runs go seed by seed, so that a sequence that is stopped half way has all variants; the same call
again resumes it, also in the middle of a run.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import DivergedError, ErrorReport, IntegrityError, MemoryShortage, RunInterrupted
from graftwerk.evaluation.results_io import ROWS, load_predictions
from graftwerk.experiments.aggregation import RunResult, measured_run
from graftwerk.experiments.eta import EtaEstimator
from graftwerk.experiments.header import own_version
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.result_folder import FORMAT, refuse_others, write_result
from graftwerk.experiments.run_events import NOTED, RunEvents, result_line
from graftwerk.experiments.sequence.plan import Plan, Variant
from graftwerk.experiments.sequence.results import Matrix, Measure
from graftwerk.own_files import refuse_links
from graftwerk.reporting.files import CONFIG, SEQUENCE
from graftwerk.serialization.atomic import write_file
from graftwerk.tasks.predictions import Predictions
from graftwerk.training.lock import RunLock
from graftwerk.training.run_dir import LOCK, REPORT, TRUNK, read_manifest

LOG = "workers.log"
LEAST_RESAMPLES = 2000
Listener = Callable[[ProgressEvent], None]


class SequenceDriver:
    """Run one sequence."""

    def __init__(self, plan: Plan, seeds: Sequence[int], listener: Listener) -> None:
        self.plan, self.seeds, self.listener = plan, list(seeds), listener
        self.tasks = [*plan.tasks]
        self.configs: dict[tuple[str, int, int], RunConfig] = {
            (variant.name, seed, place): plan.config_of(variant, seed, place)
            for seed in self.seeds
            for variant in plan.variants
            for place in range(len(self.tasks))
        }
        self.eta = EtaEstimator([name for name, _, _ in self.configs])
        self.runs: dict[tuple[str, int, int], RunResult] = {}
        self._trained: set[tuple[str, int, int]] = set()  # by this call
        self.failed: dict[str, dict[int, str]] = {variant.name: {} for variant in plan.variants}
        self.folder = plan.folder

    def run(self, runner: type[JobRunner], *, overwrite: bool) -> None:
        """Make what is left of the sequence, and write its result.

        Raises:
            ConflictError: The folder is in use, or holds something else.
            GraftwerkError: As `sequence` does.
        """
        refuse_others(self.folder, SEQUENCE)
        below = [f"{variant.name}-seed{seed}" for variant in self.plan.variants for seed in self.seeds]
        refuse_links(self.folder, (LOCK, SEQUENCE, CONFIG, LOG, REPORT, TRUNK, *below))
        with RunLock(self.folder), runner(self.folder / LOG) as workers:
            count = len(self.configs)
            self._emit("note", text=f"{len(self.tasks)} tasks, {len(below)} sequences of them, {count} runs")
            self._check(workers, overwrite)
            write_result(self.folder / SEQUENCE, {**self._header(), "status": "running", "variants": []})
            write_file(self.folder / CONFIG, self.plan.dump(), own=True)
            self._run_all(workers, overwrite)
            self._finish()

    def _check(self, workers: JobRunner, overwrite: bool) -> None:
        """Check rows, models and methods of every task before any training."""
        for place, name in enumerate(self.tasks):
            configs, runs = {}, {}
            for variant in self.plan.variants:
                config = self.configs[variant.name, self.seeds[0], place]
                configs[variant.name] = alone(config)
                for seed in [] if overwrite else self.seeds:
                    own = self.configs[variant.name, seed, place]
                    if own.output_dir.is_dir():
                        runs[str(own.output_dir)] = own.model_dump(mode="json")
            job = {"kind": "check", "configs": configs, "runs": runs}
            workers.run(job, lambda event, name=name: self._emit("phase", name, event.get("name", "")))  # type: ignore[misc]

    def _run_all(self, workers: JobRunner, overwrite: bool) -> None:
        if overwrite:  # at once: what is left of it would pass for finished if this call is stopped
            for config in self.configs.values():
                shutil.rmtree(config.output_dir, ignore_errors=True)
        try:
            for seed in self.seeds:
                for variant in self.plan.variants:
                    for place in range(len(self.tasks)):
                        if seed not in self.failed[variant.name]:
                            self._run_one(workers, variant, seed, place, overwrite)
        except ErrorReport as error:
            error.recovered = f"{len(self.runs)} of {len(self.configs)} runs in {self.folder}"
            if isinstance(error, RunInterrupted):
                error.hint = "run the same command again to resume"
            raise

    def _run_one(self, workers: JobRunner, variant: Variant, seed: int, place: int, overwrite: bool) -> None:
        key = (variant.name, seed, place)
        config, label = self.configs[key], f"{variant.name}, seed {seed}, {self.tasks[place]}"
        # one that descends from an earlier training of the task before it belongs to another sequence
        overwrite = overwrite or (variant.adapters == "one" and (variant.name, seed, place - 1) in self._trained)
        metric, folder = config.task.main_metric, config.output_dir
        manifest = None if overwrite else read_manifest(folder)
        if manifest is not None:
            if (found := measured_run(folder)) is not None:
                self.runs[key] = found
                self.eta.finished(variant.name, None)
                self._emit("note", label, f"already finished: {result_line(found, metric)}")
                return
            if manifest["status"] == "diverged":
                self._record(variant, seed, label, str((manifest.get("error") or {}).get("what", "diverged")))
                return
        began, progress = time.monotonic(), RunEvents()

        def on_event(event: dict[str, Any]) -> None:
            text = progress.update(event)
            kind = "note" if event["kind"] in NOTED else "phase" if event["kind"] == "phase" else "step"
            left = self.eta.left(time.monotonic() - began, progress.left_seconds)
            self._emit(kind, label, text, progress.step, progress.steps, left)

        self._trained.add(key)
        job = {"kind": "run", "config": config.model_dump(mode="json"), "overwrite": overwrite, "trial": False}
        try:
            workers.run({**job, "trunk": str(self.folder / TRUNK)}, on_event)
        except (DivergedError, Crashed, MemoryShortage) as error:
            self._record(variant, seed, label, error.what)
            return
        found = measured_run(folder)
        if found is None:
            raise IntegrityError(f"the run {folder} ended without a result", where=str(folder))
        self.runs[key] = found
        self.eta.finished(variant.name, time.monotonic() - began)
        self._emit("run", label, result_line(found, metric), left=self.eta.left())

    def _record(self, variant: Variant, seed: int, label: str, reason: str) -> None:
        self.failed[variant.name][seed] = reason
        self._emit("note", label, f"failed: {reason}")

    # -- the result --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        shutil.rmtree(self.folder / TRUNK, ignore_errors=True)
        whole = {
            variant.name: seeds
            for variant in self.plan.variants
            if (seeds := [seed for seed in self.seeds if seed not in self.failed[variant.name]])
        }
        metrics = [self.configs[self.plan.variants[0].name, self.seeds[0], at].task.main_metric for at in self._places]
        matrix, measures = None, dict[str, Measure]()
        if whole:
            evaluation = next(iter(self.configs.values())).evaluation
            cells = {key: cell for variant in self.plan.variants for key, cell in self._cells(variant)}
            matrix = Matrix(
                cells, metrics, whole,
                confidence=evaluation.confidence, resamples=max(evaluation.resamples, LEAST_RESAMPLES),
            )  # fmt: skip
            measures = matrix.measures()
        variants = [
            self._variant(variant, matrix if variant.name in whole else None, measures)
            for variant in self.plan.variants
        ]
        first = next((each for each in variants if each["matrix"]), {})
        named = ("matrix", "mean", "learning", "backward_transfer", "forgetting")
        write_result(
            self.folder / SEQUENCE,
            {
                **self._header(),
                **{name: first.get(name) for name in named},
                "variants": variants,
                "differences": {name: measure.differences for name, measure in measures.items()},
                "status": "finished",
                "seconds": sum(run.manifest["cost"]["training_seconds"] for run in self.runs.values()),
            },
        )
        self._emit("end", text="done")

    @property
    def _places(self) -> range:
        return range(len(self.tasks))

    def _cells(self, variant: Variant) -> list[tuple[tuple[str, int, int, int], Predictions]]:
        """Return the predictions of a variant: of task i after task j, for each seed."""
        found = []
        for seed in self.seeds:
            if seed in self.failed[variant.name]:
                continue
            for after in self._places:
                for task in range(after + 1):
                    cell = self._cell(variant, seed, after, task)
                    found.append(((variant.name, seed, after, task), cell))
        return found

    def _cell(self, variant: Variant, seed: int, after: int, task: int) -> Predictions:
        if task == after or variant.adapters == "each":  # nothing that a task has of its own changes later
            return self.runs[variant.name, seed, task].predictions
        run = self.runs[variant.name, seed, after]
        entry = run.manifest["retained"]["entries"][self.tasks[task]]
        stored = entry["stored"]
        predictions = load_predictions(run.folder / ROWS, {**stored, "labels": entry["labels"]}, stored["name"])
        if predictions is None:
            raise IntegrityError(
                f"the predictions of `{self.tasks[task]}` are not those that were written", where=str(run.folder)
            )
        return predictions

    def _variant(self, variant: Variant, matrix: Matrix | None, measures: Mapping[str, Measure]) -> dict[str, Any]:
        runs = [run for (name, _, _), run in self.runs.items() if name == variant.name]
        config = self.configs[variant.name, self.seeds[0], 0]
        costs = [run.manifest["cost"] for run in runs]
        return {
            "name": variant.name,
            "method": config.method.to_dict(),
            "adapters": variant.adapters,
            "changes": dict(variant.changes),
            "matrix": None if matrix is None else matrix.rows(variant.name),
            **{
                name: measure.to_dict(variant.name)
                for name, measure in measures.items()
                if matrix is not None and variant.name in measure.values
            },
            "cost": {
                "training_seconds": sum(cost["training_seconds"] for cost in costs) / max(len(self.seeds), 1),
                "retention_seconds": sum(_seconds(cost) for cost in costs) / max(len(self.seeds), 1),
                "peak_memory_bytes": max((cost.get("peak_memory_bytes") or 0 for cost in costs), default=0) or None,
            },
            "failed": {str(seed): why for seed, why in self.failed[variant.name].items()},
        }

    def _header(self) -> dict[str, Any]:
        first = self.plan.variants[0]
        configs = [self.configs[first.name, self.seeds[0], place] for place in self._places]
        known = [self.runs.get((first.name, self.seeds[0], place)) for place in self._places]
        return {
            "format": FORMAT,
            "graftwerk": own_version(),
            "command": shlex.join(
                [
                    "graftwerk",
                    "sequence",
                    str(self.folder.absolute() / CONFIG),
                    f"seeds={','.join(map(str, self.seeds))}",
                ]
            ),
            "model": configs[0].model,
            "tasks": [
                {
                    "name": name,
                    "task": config.task.name,
                    "metric": config.task.main_metric,
                    "rows": None if run is None else run.evaluation["rows"],
                    "split": None if run is None else run.evaluation["split"],
                }
                for name, config, run in zip(self.tasks, configs, known, strict=True)
            ],
            "seeds": self.seeds,
            "confidence": configs[0].evaluation.confidence,
        }

    def _emit(
        self, kind: Any, run: str = "", text: str = "", step: int = 0, steps: int = 0, left: float | None = None
    ) -> None:
        self.listener(ProgressEvent(kind, self.eta.done, len(self.eta.planned), run, text, step, steps, left))


def alone(config: RunConfig) -> dict[str, Any]:
    """Return a run's settings without the runs before it, which do not exist when all is checked."""
    tree = config.model_dump(mode="json")
    tree["training"] |= {"warm_start": None, "new_head": False, "retain": None}
    tree["evaluation"] |= {"retained": {}, "max_forgetting": None}
    return tree


def _seconds(cost: Mapping[str, Any]) -> float:
    """Return what the strategies of a run took."""
    known = cost.get("retention") or {}
    return float(known.get("start_seconds", 0.0)) + float(known.get("step_seconds", 0.0))
