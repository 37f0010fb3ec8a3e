"""`compare`: methods on the user's data, over several seeds, with the significance of their differences.

Every method and seed is an ordinary run folder below `output_dir` (`lora-seed0`, ...), trained and evaluated in a
process of its own that is forked from one with all imports done (`fork_server.py`). All runs share base, rows and
splits; only the method and the seed differ, and each method trains at its own learning rate. Runs go seed by seed, so
that a comparison interrupted half way already has all methods. The same call again resumes it, even in the middle of a
run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig, parse_overrides
from graftwerk.errors import (
    ConfigError,
    ConflictError,
    DivergedError,
    ErrorReport,
    IntegrityError,
    RunInterrupted,
)
from graftwerk.experiments.aggregation import RunResult, aggregate, measured_run
from graftwerk.experiments.eta import EtaEstimator
from graftwerk.experiments.header import CONFIG, FORMAT, comparison_header
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.method_specs import MethodSpec, parse_method_specs, parse_seeds, with_and_without
from graftwerk.experiments.progress import ComparisonDisplay, ProgressEvent
from graftwerk.experiments.run_events import NOTED, RunEvents, result_line
from graftwerk.experiments.significance import COSTS
from graftwerk.experiments.table import plain, rich_table
from graftwerk.experiments.tuning import chosen, planned_runs, read_axes, sentences, tuned
from graftwerk.own_files import refuse_links
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_sealed, understood
from graftwerk.training.lock import RunLock
from graftwerk.training.run_dir import LOCK, MANIFEST, REPORT, TRUNK, read_manifest
from graftwerk.yaml_files import read_yaml

COMPARISON, LOG = "comparison.json", "workers.log"
COMPARISON_SCALE = 16
"""Times the size of other JSON files that it may have: it holds each pair of methods."""

Listener = Callable[[ProgressEvent], None]


class Comparison:
    """A comparison on disk.

    Attributes:
        folder: Its folder, with a run folder for each method and seed.
        result: Contents of `comparison.json`.
        report: Path of `report.html`, or None if no report was requested.

    Raises:
        ConfigError: There is no comparison in that folder.
        IntegrityError: `comparison.json` is damaged, or has another format version.
    """

    def __init__(self, folder: str | Path, *, report: Path | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / COMPARISON).is_file():
            raise ConfigError(f"{folder} holds no comparison: it has no {COMPARISON}")
        refuse_links(self.folder, (COMPARISON,))
        self.result = read_sealed(self.folder / COMPARISON, scale=COMPARISON_SCALE)
        if self.result.get("format") != FORMAT:
            raise IntegrityError(f"{COMPARISON} has another format than {FORMAT}", where=str(self.folder))
        self.report = report

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `graftwerk compare --json` prints."""
        return {"comparison": str(self.folder), "report": str(self.report) if self.report else None, **self.result}

    def table(self) -> str:
        """Return the result as plain text: one row per method, and notes below."""
        with understood(self.folder / COMPARISON):
            return plain(self.result)

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        with understood(self.folder / COMPARISON):
            return rich_table(self.result)

    def __repr__(self) -> str:
        return f"<Comparison {self.folder}: {len(self.result['methods'])} methods, {len(self.result['seeds'])} seeds>"


def compare(
    config: RunConfig | str | Path | Mapping[str, Any],
    methods: Sequence[Any] | str,
    seeds: Sequence[int] | int | str = (0, 1, 2),
    *,
    augment: Sequence[str] | str | None = None,
    overwrite: bool = False,
    metric: str | None = None,
    prefer: str = "trained_parameters",
    margin: float | None = None,
    listener: Listener | None = None,
    quiet: bool = False,
    report: bool = True,
    **overrides: Any,
) -> Comparison:
    """Train and evaluate each method with each seed, and test the differences for significance.

    A second call with the same settings resumes an interrupted comparison. A run that diverges, or whose process dies,
    is reported and the others continue; any other error stops the comparison, and finished runs stay on disk.

    Args:
        config: A run file, its content, or a `RunConfig`. Its `method` and seed are not used; `output_dir` is the
            folder of the comparison.
        methods: Names (`lora`), shorthands (`dora`), mappings (``{name: lora, r: 16}``; a `label` names it), or
            method objects.
        seeds: Training seeds. The split of the rows has its own seed and is the same for all runs.
        augment: `with`, `without` or `with,without`: each method with the rows of `data.augment`, without them, or
            both. None means the methods as they are.
        overwrite: Train all runs again.
        metric: The metric that decides. Default: the task's own.
        prefer: The cost that the recommendation minimises, one of `significance.COSTS`.
        margin: Largest distance from the best mean, in the metric's own unit, at which a method may be recommended.
            Default: a point, or one percent of the best if the metric has no points.
        listener: Called with every `ProgressEvent`, in place of the progress display on stderr.
        quiet: Show no progress.
        report: Write `report.html`.
        **overrides: Settings of the run file by name, as for `train`. Several values of a setting of the training
            (``learning_rate=[1e-3, 3e-3]``) are tried for each method; what stands for it is chosen on validation rows.

    Returns:
        The comparison, whose `table` is the result as text.

    Raises:
        ConfigError, DataError, ModelError: Found before training begins.
        ConflictError: The folder is in use, or holds other runs.
        RunInterrupted: SIGINT or SIGTERM came; the active run has saved a checkpoint.
        ResourceError: Disk or memory do not suffice.

    Example:
        Settings are checked before any process is started:

        >>> from graftwerk import compare
        >>> config = {"model": "some/model", "data": {"train": "reviews.csv"}, "output_dir": "runs/comparison"}
        >>> compare(config, methods=["lora", {"name": "lora", "r": 16}, "lroa"], seeds=[0, 1, 2])
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: there is no method `lroa`
        ...
    """
    display = None if quiet or listener is not None else ComparisonDisplay()
    driver = _ComparisonDriver(
        config,
        parse_method_specs(methods),
        parse_seeds(seeds),
        overrides,
        augment,
        listener=listener or display or (lambda event: None),
    )
    check_choices(driver.base, metric, prefer)
    try:
        driver.run(overwrite=overwrite, metric=metric, prefer=prefer, margin=margin)
    finally:
        if display is not None:
            display.close_bar()
    report_path = None
    if report:
        from graftwerk.reporting.html import write_report

        report_path = write_report(driver.folder)
    return Comparison(driver.folder, report=report_path)


def check_choices(base: RunConfig, metric: str | None, prefer: str | None) -> None:
    """Raise ConfigError for an unknown metric or cost.

    Args:
        base: Settings of the comparison, whose task has the metrics.
        metric: Name of a metric, or None for the task's default.
        prefer: Name of a cost, or None for the default.

    Raises:
        ConfigError: The metric or cost does not exist; the message lists those that do.
    """
    known = base.task.metrics
    if metric is not None and metric not in known:
        raise ConfigError(
            f"there is no metric `{metric}` for {base.task.name}",
            where="metric",
            hint=f"there are: {', '.join(known)}",
        )
    if prefer is not None and prefer not in COSTS:
        raise ConfigError(f"there is no cost `{prefer}`", where="prefer", hint=f"there are: {', '.join(COSTS)}")


class _ComparisonDriver:
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
    ) -> None:
        tree = tree_of(config)
        _refuse_overrides(overrides)
        self.axes, others = read_axes(overrides)
        base = RunConfig.build(
            {**tree, "method": specs[0].method},
            others,
            where=str(config) if isinstance(config, str | Path) else None,
        ).anchored()
        self.run_file_method = tree.get("method")
        specs = with_and_without(specs, augment, bool(base.data.augment))
        self.base, self.seeds, self.augment = base, seeds, augment
        self.methods, self.specs = specs, tuned(specs, self.axes)
        specs = self.specs
        self.folder = base.output_dir
        self.listener = listener
        self.plan = [(spec, seed) for seed in seeds for spec in specs]
        self.eta = EtaEstimator([spec.name for spec, _ in self.plan])
        self.runs: dict[str, dict[int, RunResult]] = {spec.name: {} for spec in specs}
        self.failed: dict[str, dict[int, str]] = {spec.name: {} for spec in specs}

    def config_of(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        """Return the resolved settings of one run, as plain values."""
        tree = spec.changed(self.base.model_dump(mode="json"))
        tree["training"]["seed"] = seed
        tree["output_dir"] = str(self.folder_of(spec, seed))
        return tree

    def folder_of(self, spec: MethodSpec, seed: int) -> Path:
        return self.folder / f"{spec.name}-seed{seed}"

    def run(self, *, overwrite: bool, metric: str | None, prefer: str, margin: float | None) -> None:
        if (self.folder / MANIFEST).exists():
            raise ConflictError(
                f"{self.folder} is the folder of a run",
                hint="give the comparison another one: output_dir=runs/comparison",
            )
        runs = [self.folder_of(spec, seed).name for spec, seed in self.plan]
        refuse_links(self.folder, (LOCK, COMPARISON, CONFIG, LOG, REPORT, TRUNK, *runs))
        with RunLock(self.folder), JobRunner(self.folder / LOG) as workers:
            self._emit("note", text=planned_runs(self.methods, self.axes, self.seeds))
            header = self._check(workers, overwrite, metric, prefer)
            self._write({**header, "status": "running", "methods": [], "differences": [], "seconds": None})
            write_file(self.folder / CONFIG, self.base.dump(), own=True)
            self._run_all(workers, header["metric"], overwrite)
            self._finish(header, prefer, margin)

    def _check(self, workers: JobRunner, overwrite: bool, metric: str | None, prefer: str) -> dict[str, Any]:
        """Check rows, models and methods before any training, and return the header of `comparison.json`."""
        try:
            checked = self._checked(workers, overwrite)
            return comparison_header(
                self.base, self.methods, self.seeds, self.augment, metric or checked["main_metric"], checked,
                prefer=prefer, own=self.run_file_method, axes=self.axes,
            )  # fmt: skip
        except ErrorReport as error:
            if not isinstance(error, Crashed) and not (self.folder / COMPARISON).exists():
                (self.folder / LOG).unlink(missing_ok=True)  # so that a comparison that never began leaves nothing
            raise

    def _checked(self, workers: JobRunner, overwrite: bool) -> dict[str, Any]:
        first = self.seeds[0]
        existing = [] if overwrite else [planned for planned in self.plan if self.folder_of(*planned).is_dir()]
        job = {
            "kind": "check",
            "configs": {spec.name: self.config_of(spec, first) for spec in self.specs},
            "runs": {str(self.folder_of(*planned)): self.config_of(*planned) for planned in existing},
        }
        return workers.run(job, lambda event: self._emit("phase", "", event.get("name", "")))

    def _run_all(self, workers: JobRunner, metric: str, overwrite: bool) -> None:
        try:
            for spec, seed in self.plan:
                self._run_one(workers, spec, seed, metric, overwrite)
        except ErrorReport as error:
            finished, failed = (sum(map(len, by_seed.values())) for by_seed in (self.runs, self.failed))
            failures = f" ({failed} failed)" if failed else ""
            error.recovered = f"{finished} of {len(self.plan)} runs{failures} in {self.folder}"
            if isinstance(error, RunInterrupted):
                error.hint = "run the same command again to resume"
            raise

    def _finish(self, header: Mapping[str, Any], prefer: str, margin: float | None) -> None:
        """Aggregate the results and write them below the header."""
        ranked, tuning = chosen(self.specs, self.runs, self.failed, header["metric"])
        result = aggregate(
            ranked,
            self.runs,
            self.failed,
            metric=header["metric"],
            confidence=self.base.evaluation.confidence,
            resamples=self.base.evaluation.resamples,
            prefer=prefer,
            margin=margin,
        )
        all_results = [run for runs in self.runs.values() for run in runs.values()]
        seconds = sum(run.manifest["cost"].get("training_seconds") or 0.0 for run in all_results)
        notes = [*filter(None, [result.get("at_chance")]), *sentences(tuning), *header["notes"]]
        if tuning:
            result["tuning"] = tuning
        shutil.rmtree(self.folder / TRUNK, ignore_errors=True)  # hidden states shared by runs on the same layers
        self._write({**header, "notes": notes, **result, "status": "finished", "seconds": seconds})
        self._emit("end", text="done")

    # -- one run -----------------------------------------------------------------------------------------------------

    def _run_one(self, workers: JobRunner, spec: MethodSpec, seed: int, metric: str, overwrite: bool) -> None:
        folder = self.folder_of(spec, seed)
        run_label = f"{spec.name}, seed {seed}"
        manifest = None if overwrite else read_manifest(folder)
        if manifest is not None:
            if (found := measured_run(folder)) is not None:
                self.runs[spec.name][seed] = found
                self.eta.finished(spec.name, None)
                self._emit(
                    "note", run_label, f"already finished: {result_line(found, metric, tuning=bool(spec.tried_for))}"
                )
                return
            if manifest["status"] == "diverged":
                self._record_failure(spec, seed, str((manifest.get("error") or {}).get("what", "diverged")))
                return
        began = time.monotonic()
        progress = RunEvents()

        def on_event(event: dict[str, Any]) -> None:
            text = progress.update(event)
            kind = "note" if event["kind"] in NOTED else "phase" if event["kind"] == "phase" else "step"
            elapsed = time.monotonic() - began
            left = self.eta.left(elapsed, progress.left_seconds)
            self._emit(kind, run_label, text, progress.step, progress.steps, left)

        try:
            job = {"kind": "run", "config": self.config_of(spec, seed), "overwrite": overwrite}
            workers.run({**job, "trunk": str(self.folder / TRUNK)}, on_event)
        except (DivergedError, Crashed) as error:
            self._record_failure(spec, seed, error.what)
            return
        found = measured_run(folder)
        if found is None:
            raise IntegrityError(f"the run {folder} ended without a result", where=str(folder))
        self.runs[spec.name][seed] = found
        self.eta.finished(spec.name, time.monotonic() - began)
        self._emit("run", run_label, result_line(found, metric, tuning=bool(spec.tried_for)), left=self.eta.left())

    def _record_failure(self, spec: MethodSpec, seed: int, reason: str) -> None:
        self.failed[spec.name][seed] = reason
        self.eta.finished(spec.name, None)
        self._emit("note", f"{spec.name}, seed {seed}", f"failed: {reason}", left=self.eta.left())

    # -- output ------------------------------------------------------------------------------------------------------

    def _write(self, result: Mapping[str, Any]) -> None:
        path = self.folder / COMPARISON
        write_file(path, dump_object(redacted(result), path, room=COMPARISON_SCALE, seal=True), own=True)

    def _emit(
        self, kind: Any, run: str = "", text: str = "", step: int = 0, steps: int = 0, left: float | None = None
    ) -> None:
        self.listener(ProgressEvent(kind, self.eta.done, len(self.plan), run, text, step, steps, left))


def tree_of(config: RunConfig | str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return a run file's content, from a path, a mapping or a `RunConfig`."""
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json")
    return dict(config) if isinstance(config, Mapping) else read_yaml(Path(config))


def _refuse_overrides(overrides: Mapping[str, Any]) -> None:
    for key in parse_overrides(dict(overrides)):
        if key.split(".")[0] == "method":
            raise ConfigError(
                f"`{key}` would hold for every method",
                where=key,
                hint="give settings with the method: methods=[{name: lora, r: 16}, ...]",
            )
        if key.split(".")[-1] == "seed":
            raise ConfigError(f"`{key}`: a comparison has several seeds", where=key, hint="seeds=0,1,2")
