"""The final comparison of a search: its best trials and the defaults with fresh seeds, two of them on the test rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from graftwerk.errors import DivergedError, IntegrityError, MemoryShortage
from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.aggregation import RunResult, aggregate, measured_run
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.method_specs import MethodSpec
from graftwerk.experiments.pareto import COSTS
from graftwerk.experiments.search.runs import Active, Runs
from graftwerk.experiments.search.settings import SearchSettings
from graftwerk.experiments.significance import describe_difference, find_difference, verdict
from graftwerk.experiments.table import format_metric
from graftwerk.experiments.workers import Workers
from graftwerk.training.lock import wait_for
from graftwerk.training.run_dir import TRIAL, TRUNK, read_manifest

FOLDER = "finals"
DEFAULTS, BEST = "defaults", "best"
FRESH = 1001
"""First fresh seed, counted from the seed of the trials."""


class Finals:
    """Train the best trials and the defaults with fresh seeds, and measure two of them.

    Args:
        runs: What the runs of the search share.
        wanted: Settings of the search.
        metric: The metric that decides.
        defaults: Settings of the run file, as a trial has them.
        records: The trials.
        higher: True if a higher value is better.
    """

    def __init__(
        self,
        runs: Runs,
        wanted: SearchSettings,
        metric: str,
        defaults: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]],
        *,
        higher: bool,
    ) -> None:
        self.runs, self.metric, self.defaults, self.higher = runs, metric, dict(defaults), higher
        first = runs.base.training.seed + FRESH
        self.seeds = list(range(first, first + wanted.repeats))
        done = [record for record in records if record["state"] == "complete"]
        done.sort(key=lambda record: (-record["value"] if higher else record["value"], record["number"]))
        distinct: list[Mapping[str, Any]] = []
        for record in done:
            if record["settings"] not in [self.defaults, *(one["settings"] for one in distinct)]:
                distinct.append(record)
        self.finalists = distinct[: wanted.finalists]
        self.settings: dict[str, dict[str, Any]] = {
            f"trial-{one['number']:03d}": one["settings"] for one in self.finalists
        }
        self.settings[DEFAULTS] = {}
        self.values: dict[str, dict[int, float]] = {name: {} for name in self.settings}
        self.failed: dict[str, dict[int, str]] = {name: {} for name in self.settings}

    def run(self, workers: Workers) -> None:
        """Train all of them, choose the winner by the validation rows, and measure it and the defaults."""
        workers.each([(name, seed) for seed in self.seeds for name in self.settings], self._train)
        self.winner = self._winner()
        both = dict.fromkeys((self.winner, DEFAULTS))
        workers.each([(name, seed) for name in both for seed in self.values.get(name, ())], self._measure)

    def result(self) -> dict[str, Any]:
        """Return the part of `search.json` that depends on the final comparison."""
        config = self.runs.base.evaluation
        specs, runs, failed = [], dict[str, dict[int, RunResult]](), dict[str, dict[int, str]]()
        for title, name in ((BEST, self.winner), (DEFAULTS, DEFAULTS)):
            if title == BEST and name == DEFAULTS:
                continue
            method = self.runs.config_of(self.settings[name], FOLDER).method
            specs.append(MethodSpec(title, method, method.to_dict()))
            found = {seed: measured_run(self._folder(name, seed)) for seed in self.values[name]}
            runs[title] = {seed: run for seed, run in found.items() if run is not None}
            failed[title] = self.failed[name]
        result = aggregate(
            specs, runs, failed, metric=self.metric, confidence=config.confidence, resamples=config.resamples,
            prefer=next(iter(COSTS)), margin=None,
        )  # fmt: skip
        measured = {method["name"]: method for method in result["methods"]}
        difference = None
        if all(measured.get(name, {}).get("figure") for name in (BEST, DEFAULTS)):
            difference = dict(find_difference(result["differences"], BEST, DEFAULTS))
            difference["verdict"] = verdict(difference, self.metric)  # type: ignore[arg-type]
            difference["text"] = describe_difference(difference, self.metric)  # type: ignore[arg-type]
        stands = self.winner == DEFAULTS or (difference is not None and difference["verdict"] == "worse")
        best = measured[DEFAULTS] if stands or BEST not in measured else measured[BEST]
        return {
            "seeds": self.seeds,
            "finalists": [self._finalist(name) for name in self.settings],
            "best": {
                "trial": None if stands else int(self.winner.partition("-")[2]),
                "settings": self.defaults if stands else self.settings[self.winner],
                "metrics": best.get("metrics", {}),
                "cost": best["cost"],
            },
            "default": {
                "settings": self.defaults,
                "metrics": measured[DEFAULTS].get("metrics", {}),
                "cost": measured[DEFAULTS]["cost"],
            },
            "difference": difference,
            "text": self._text(difference),
            "rows": result.get("rows"),
            "split": result.get("split"),
            "base_fingerprint": result.get("base_fingerprint"),
        }

    # -- inside ------------------------------------------------------------------------------------------------------

    def _folder(self, name: str, seed: int) -> Any:
        return self.runs.folder / FOLDER / f"{name}-seed{seed}"

    def _train(self, runner: JobRunner, planned: tuple[str, int]) -> None:
        name, seed = planned
        active, folder = Active(f"{name}, seed {seed}"), self._folder(name, seed)
        place = str(folder.relative_to(self.runs.folder))
        manifest = read_manifest(folder)
        config = self.runs.config_of(self.settings[name], place, seed)
        try:
            if manifest is not None:
                wait_for(folder)
            if manifest is None or manifest["status"] not in (TRIAL, "finished"):
                self.runs.train(runner, config, active)
        except (DivergedError, Crashed, MemoryShortage) as error:
            with self.runs.lock:
                self.failed[name][seed] = error.what
                self.runs.eta.finished("final", None)
                self.runs.emit("note", active.label, f"failed: {error.what}")
            return
        value = self.runs.validation_value(place, self.metric)
        with self.runs.lock:
            if value is None:
                self.failed[name][seed] = "the metric is undefined on the validation rows"
            else:
                self.values[name][seed] = value
            self.runs.eta.finished("final", time.monotonic() - active.began)
            text = f"validation {METRICS[self.metric].title} {format_metric(value, self.metric)}"
            self.runs.emit("run", active.label, text, left=self.runs.left())

    def _measure(self, runner: JobRunner, planned: tuple[str, int]) -> None:
        name, seed = planned
        folder, began, label = self._folder(name, seed), time.monotonic(), f"{name}, seed {seed}, test rows"

        def on_event(event: dict[str, Any]) -> None:
            with self.runs.lock:
                self.runs.emit("phase", label, event.get("name", ""))

        if (done := measured_run(folder)) is None:
            config = self.runs.config_of(self.settings[name], str(folder.relative_to(self.runs.folder)), seed)
            job = {"kind": "run", "config": config.model_dump(mode="json"), "overwrite": False, "trial": False}
            runner.run({**job, "trunk": str(self.runs.folder / TRUNK)}, on_event)
            done = measured_run(folder)
        if done is None:
            raise IntegrityError(f"the run {folder} was measured without a result", where=str(folder))
        value = done.evaluation["metrics"].get(self.metric, {}).get("value")
        with self.runs.lock:
            self.runs.eta.finished("measurement", time.monotonic() - began)
            said = f"{METRICS[self.metric].title} {format_metric(value, self.metric)}"
            self.runs.emit("run", label, said, left=self.runs.left())

    def _winner(self) -> str:
        """Return the finalist with the best mean on the validation rows, of those with the most runs that ended."""
        ended = {name: values for name, values in self.values.items() if values and name != DEFAULTS}
        if not ended:
            return DEFAULTS
        known = METRICS[self.metric]
        return max(ended, key=lambda name: (len(ended[name]), known.better(fmean(ended[name].values()), 0.0)))

    def _finalist(self, name: str) -> dict[str, Any]:
        values = self.values[name]
        return {
            "name": name,
            "settings": self.settings[name] or self.defaults,
            "validation": {str(seed): value for seed, value in sorted(values.items())},
            "mean": fmean(values.values()) if values else None,
            "failed": {str(seed): why for seed, why in sorted(self.failed[name].items())},
            "chosen": name == self.winner,
        }

    def _text(self, difference: Mapping[str, Any] | None) -> str:
        title = METRICS[self.metric].title
        if self.winner == DEFAULTS and self.finalists:
            return "All finalists failed with fresh seeds; the defaults stand."
        if self.winner == DEFAULTS:
            return "No trial was better than the defaults on the validation rows, and the defaults stand."
        if difference is None:
            return "The settings found could not be compared with the defaults: all runs of one of them failed."
        lead = {
            "better": f"The settings found beat the defaults: {title} ",
            "worse": f"The settings found are worse than the defaults, which stand: {title} ",
        }.get(difference["verdict"], "No difference shown from the defaults: ")
        said = difference["text"].removeprefix("no difference shown: ")
        return f"{lead}{said} on test rows that no trial has seen, {len(self.seeds)} fresh seeds each."
