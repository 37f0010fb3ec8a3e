"""One search on disk: its trials, the final comparison on fresh rows, its result, and progress events."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import (
    ConfigError,
    ConflictError,
    DivergedError,
    ErrorReport,
    MemoryShortage,
    ModelError,
    RunInterrupted,
)
from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.header import CONFIG
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.result_folder import FORMAT, refuse_others, write_result
from graftwerk.experiments.search.finals import Finals
from graftwerk.experiments.search.header import search_header
from graftwerk.experiments.search.journal import JOURNAL, require_optuna
from graftwerk.experiments.search.runs import Active, Listener, Runs
from graftwerk.experiments.search.settings import SearchSettings
from graftwerk.experiments.search.space import Axis, default_settings, grid, value_text
from graftwerk.experiments.search.study import Study, Ticket
from graftwerk.experiments.table import format_metric
from graftwerk.experiments.workers import Machines, Workers
from graftwerk.own_files import refuse_links
from graftwerk.reporting.files import SEARCH
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.training.lock import RunLock, wait_for
from graftwerk.training.run_dir import CHECKPOINTS, LOCK, REPORT, TRUNK

BEST_FILE, TRIALS, FINALS, BEST, LOG = "best.yaml", "trials", "finals", "best", "workers.log"
NO_SCORES = "answers of this task have no score for each row, so that Wilcoxon's test gives no trial up; pruner=median"
OWN = (BEST_FILE, CONFIG, LOG, REPORT, TRUNK, TRIALS, FINALS, SEARCH, JOURNAL)
"""All that a search writes into its folder; last what marks the others as its own."""


class SearchDriver:
    """Run one search.

    Args:
        base: Settings that all trials share; its `output_dir` is the folder of the search.
        axes: The space.
        wanted: Settings of the search.
        notes: Remarks on the space.
        listener: Called with every progress event.

    Raises:
        ResourceError: Optuna is not installed.
    """

    def __init__(
        self, base: RunConfig, axes: Sequence[Axis], wanted: SearchSettings, notes: Sequence[str], *, listener: Listener
    ) -> None:
        require_optuna()
        self.base, self.axes, self.wanted, self.notes = base, list(axes), wanted, list(notes)
        self.folder, self.defaults = base.output_dir, default_settings(base, axes)
        self.metric, self.train_rows = "", 0
        points = len(grid(axes)) if wanted.sampler == "grid" else math.inf
        self.trials = int(min(wanted.most or points, points)) if wanted.most or points < math.inf else 0
        planned = ["trial"] * self.trials + ["final"] * ((wanted.finalists + 1) * wanted.repeats)
        planned += ["measurement"] * (2 * wanted.repeats)
        self.runs = Runs(base, planned if self.trials else [], wanted.workers, listener)

    def run(self, machines: Machines, *, overwrite: bool) -> None:
        """Search, or go on with it, and write the result.

        Raises:
            ConflictError: The folder holds something else, is in use, or has a search with other settings.
            RunInterrupted: A signal came; the trials at work have saved.
        """
        refuse_others(self.folder, SEARCH)
        there = [name for name in OWN if (self.folder / name).exists()]
        searched = {SEARCH, JOURNAL} & {*there}
        if {*there} - {LOG, TRUNK} and not searched:  # what a search leaves that was killed before its first trial
            hint = "give the search another one: output_dir=runs/search"
            raise ConflictError(f"{self.folder} holds `{there[0]}`, and no search", hint=hint)
        refuse_links(self.folder, (LOCK, *OWN))
        fresh = not there
        with RunLock(self.folder), Workers(machines.runners(self.folder / LOG)) as workers:
            try:
                self._run_in_lock(workers, overwrite)
            except ErrorReport as error:
                began = (self.folder / SEARCH).exists()
                if fresh and not began and not isinstance(error, Crashed):
                    _clear(self.folder)  # a search that never began leaves nothing
                if began:
                    error.recovered = f"{self._finished_trials()} trials in {self.folder}"
                if isinstance(error, RunInterrupted):
                    error.hint = "run the same command again to resume"
                raise

    def _run_in_lock(self, workers: Workers, overwrite: bool) -> None:
        checked = workers.runners[0].run(
            self._check_job(), lambda event: self.runs.emit("phase", "", event.get("name", ""))
        )
        require_rows(checked["rows"])
        self.metric, self.train_rows = self.wanted.metric or checked["main_metric"], checked["rows"]["train"]
        if overwrite:
            _clear(self.folder, but=LOG)  # which the workers write
        self._open_study(checked)
        header = search_header(self.base, self.axes, self.wanted, self.defaults, self.metric, checked)
        self.header = {"format": FORMAT, **header}
        self._write("running")
        write_file(self.folder / CONFIG, self.base.dump(), own=True)
        workers.do(self._one_trial)
        self._run_finals(workers)

    def _open_study(self, checked: Mapping[str, Any]) -> None:
        """Open the journal of the trials, and say which of them resume."""
        self.study = Study(
            self.folder / JOURNAL, self.axes, self.defaults,
            sampler=self.wanted.sampler, pruner=self.wanted.pruner, seed=self.base.training.seed,
            higher=METRICS[self.metric].higher is not False,
        )  # fmt: skip
        self.study.check_identity(self._identity(checked))
        if self.study.cut:
            self._note(f"the last {self.study.cut} bytes of {JOURNAL} were torn off by a kill, and are cut off")
        for _ in range(len(self.study) - self.study.stale):
            self.runs.eta.finished("trial", None)
        if self.study.stale:
            self._note(f"{self.study.stale} of {len(self.study)} trials were running when an earlier search ended; "
                       "they resume")  # fmt: skip

    def _run_finals(self, workers: Workers) -> None:
        """Train the best trials again with fresh seeds, and write the result.

        Raises:
            DivergedError: No trial came to an end.
        """
        records = self.study.records()
        if not any(record["state"] == "complete" for record in records):
            reasons = [record["reason"] for record in records if record["reason"]]
            raise DivergedError(
                f"none of the {len(records)} trials came to an end" + (f": {reasons[0]}" if reasons else ""),
                hint="a lower learning rate: learning_rate=1e-5..1e-3; or a smaller model",
            )
        finals = Finals(self.runs, self.wanted, self.metric, self.defaults, records, higher=self.study.higher)
        finals.run(workers)
        result = {**finals.result(), "importance": self.study.importances()}
        shutil.rmtree(self.folder / TRUNK, ignore_errors=True)
        best = self.runs.config_of(result["best"]["settings"], BEST)
        opening = f"# {result['text']}\n# graftwerk train {BEST_FILE}\n"
        write_file(self.folder / BEST_FILE, opening + best.dump(), own=True)
        self._write("finished", result)
        self.runs.emit("end", text="done")

    def _check_job(self) -> dict[str, Any]:
        """Return the job that checks rows, model, and each choice of the method's settings on it."""
        configs = {"defaults": self.runs.tree}
        for axis in self.axes:
            for choice in axis.choices if axis.key.startswith("method.") else ():
                changed = RunConfig.build(self.runs.tree, {axis.key: choice})
                configs[f"{axis.name}={value_text(choice)}"] = changed.model_dump(mode="json")
        # a choice that does not fit into memory is a trial that is refused; the defaults must fit
        return {"kind": "check", "configs": configs, "runs": {}, "memory": ["defaults"]}

    def _identity(self, checked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what makes this search another one than a search with other settings."""
        wanted = {"sampler": self.wanted.sampler, "pruner": self.wanted.pruner, "metric": self.metric}
        space = {axis.name: axis.to_dict() for axis in self.axes}
        return {"config": redacted(self.runs.tree), "axis": space, **wanted, "rows": checked["fingerprint"][:12]}

    # -- trials ------------------------------------------------------------------------------------------------------

    def _one_trial(self, runner: JobRunner) -> bool:
        with self.runs.lock:
            if not self.study.stale and self._spent():
                return False
            ticket = self.study.next()
        name = f"{TRIALS}/{ticket.number:03d}"
        active = Active(f"trial {ticket.number}")
        config = self.runs.config_of(ticket.settings, name)

        def gives_up(event: Mapping[str, Any]) -> bool:
            hopeless = self._is_hopeless(ticket, event, active.rows, config)
            return hopeless and event["step"] < active.progress.steps  # it is done anyway

        try:
            if ticket.resumed:
                wait_for(self.folder / name)
                active.ended = self.study.was_hopeless(ticket)
            if active.ended:  # it was killed between that and its end
                raise RunInterrupted(signal.SIGTERM, "given up before it was killed")
            self.runs.train(runner, config, active, rows=self.wanted.pruner == "wilcoxon", gives_up=gives_up)
            value, reason = self.runs.validation_value(name, self.metric), "the metric is undefined on validation rows"
        except RunInterrupted:
            if not active.ended or runner.signum is not None:
                raise
            value, reason = None, ""
        except (DivergedError, Crashed, MemoryShortage, ConfigError, ModelError) as error:
            value, reason = None, error.what
        seconds = time.monotonic() - active.began
        with self.runs.lock:
            self._tell(ticket, active, value, reason, seconds)
        shutil.rmtree(self.folder / name / CHECKPOINTS, ignore_errors=True)
        return True

    def _tell(self, ticket: Ticket, active: Active, value: float | None, reason: str, seconds: float) -> None:
        if value is not None:
            self.study.complete(ticket, value, seconds)
            text = f"validation {METRICS[self.metric].title} {format_metric(value, self.metric)}"
        elif active.lacks:
            self.study.refuse(ticket, reason, seconds, active.lacks)
            text = f"too large for the memory: {reason}"
        elif active.ended:
            self.study.prune(ticket, seconds)
            text = f"given up after {active.progress.step} steps"
        else:
            self.study.fail(ticket, reason, seconds)
            text = f"failed: {reason}"
        self.runs.eta.finished("trial", seconds)
        settings = ", ".join(f"{key.partition('.')[2]} {value_text(one)}" for key, one in ticket.settings.items())
        self._write("running")
        self.runs.emit("run", active.label, f"{text} ({settings})", left=self.runs.left())

    def _is_hopeless(
        self, ticket: Ticket, event: Mapping[str, Any], rows: list[float] | None, config: RunConfig
    ) -> bool:
        value = event.get(self.metric)
        if value is None:  # generated texts are only measured at the end
            value = None if event.get("loss") is None else event["loss"] * (-1 if self.study.higher else 1)
        if value is None or not math.isfinite(value):
            return False
        if rows is None and self.wanted.pruner == "wilcoxon" and NO_SCORES not in self.notes:
            self._note(NO_SCORES)
        steps_per_epoch = math.ceil(self.train_rows / config.training.global_batch_size())
        step = round(100 * event["step"] / steps_per_epoch)
        return self.study.is_hopeless(ticket, step, value, rows)

    def _spent(self) -> bool:
        """Return True if the budget is used up."""
        if self.trials and len(self.study) >= self.trials:  # of a grid: its points
            return True
        limit = self.wanted.seconds
        used = sum(record["seconds"] or 0.0 for record in self.study.records()) / self.wanted.workers
        return limit is not None and used >= limit

    # -- output ------------------------------------------------------------------------------------------------------

    def _finished_trials(self) -> int:
        study = getattr(self, "study", None)
        return 0 if study is None else sum(record["state"] != "running" for record in study.records())

    def _write(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        notes = [*self.notes, *self.header["notes"]]
        content = {**self.header, "notes": notes, "status": status, "trials": self.study.records(), **(result or {})}
        write_result(self.folder / SEARCH, content)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.runs.emit("note", text=text)


def require_rows(rows: Mapping[str, int]) -> None:
    """Refuse to search without rows for it, or without others for the final comparison.

    Raises:
        ConfigError: There are no validation rows, or no test rows.
    """
    if not rows.get("validation"):
        raise ConfigError(
            "trials are judged on validation rows, and there are none",
            where="data.validation",
            hint="data.validation=0.1",
        )
    if not rows.get("test"):
        raise ConfigError(
            "the final comparison needs test rows that no trial has seen, and there are none",
            where="data.test",
            hint="data.test=0.2",
        )


def _clear(folder: Path, but: str = "") -> None:
    """Remove the files of an earlier search."""
    for name in OWN:
        if name == but:
            continue
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
