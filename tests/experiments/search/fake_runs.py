"""Runs of a search without a model: a synthetic score of the settings, and the files that a real run leaves."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from graftwerk.errors import DivergedError, MemoryShortage, RunInterrupted
from graftwerk.evaluation.results_io import store_evaluation
from graftwerk.experiments.job_runner import JobRunner
from graftwerk.serialization.info import OWN_FILE
from graftwerk.tasks.predictions import ClassPredictions
from graftwerk.training.run_dir import TRIAL, RunDir, read_manifest

EPOCHS, ROWS, STEPS = 3, 400, 10
ROWS_OF = {"train": 160, "validation": 40, "test": ROWS}


def quality(config: Mapping[str, Any]) -> float:
    """Best at a learning rate of 3e-3 and the largest rank; the seed moves it a little."""
    training, method = config["training"], config["method"]
    rate = training["learning_rate"] if training["learning_rate"] != "auto" else 1e-4
    off = abs(math.log10(rate) - math.log10(3e-3))
    return float(0.9 - 0.2 * off + 0.002 * method.get("r", 0) + 0.003 * (training["seed"] % 3))


class FakeRunner(JobRunner):
    """Jobs done at once, in this process. `at` is called before each evaluation of a run.

    Without `measures`, evaluations on the way give the loss alone, as those of tasks that write do.
    """

    at: ClassVar[Callable[[Mapping[str, Any], int], None]] = staticmethod(lambda job, epoch: None)
    lacks: ClassVar[Callable[[Mapping[str, Any]], int]] = staticmethod(lambda config: 0)
    """Bytes of memory that a run lacks by its plan."""
    rows: ClassVar[int | None] = 40
    measures: ClassVar[bool] = True
    jobs: ClassVar[list[dict[str, Any]]] = []

    def run(self, job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        self.check()
        self.asked = False
        FakeRunner.jobs.append(dict(job))
        if job["kind"] == "check":
            return {
                "rows": ROWS_OF, "labels": ["a", "b"], "fingerprint": "f" * 64, "origin": {}, "findings": [],
                "summary": {}, "parameters": {}, "main_metric": "accuracy", "machine": {"device": "none", "threads": 1},
            }  # fmt: skip
        if job["kind"] == "run":
            _measure(RunDir(Path(job["config"]["output_dir"])))
            return {}
        config, value = job["config"], quality(job["config"])
        if lacks := FakeRunner.lacks(config):
            on_event({"kind": "unfit", "step": 0, "needed_bytes": 100 + lacks, "available_bytes": 100})
            raise MemoryShortage(f"training needs {100 + lacks} bytes, and 100 are available")
        folder = RunDir(Path(config["output_dir"]))
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_manifest({"status": "training", "config": config})
        for epoch in range(1, EPOCHS + 1):
            FakeRunner.at(job, epoch)
            if config["training"]["learning_rate"] == 0.5:
                raise DivergedError("the loss is not finite")
            now = value - 0.1 * (EPOCHS - epoch)
            if job["rows"] and FakeRunner.rows:
                right = [float(row < now * FakeRunner.rows) for row in range(FakeRunner.rows)]
                on_event({"kind": "rows", "step": epoch * STEPS, "rows": right})
            on_event({"kind": "progress", "step": epoch * STEPS, "total": EPOCHS * STEPS})
            figures = {"accuracy": now} if FakeRunner.measures else {}
            on_event({"kind": "evaluation", "step": epoch * STEPS, "loss": 1 - now, **figures})
            if self.asked:
                raise RunInterrupted(signal.SIGTERM, "stopped")
        content = {
            "status": TRIAL,
            "config": config,
            "base_fingerprint": "b",
            "data": {"fingerprint": "f", "origin": {}},
        }
        content |= {"metrics": {"validation": {"accuracy": {"value": value, "low": None, "high": None}}}}
        content |= {"cost": {"training_seconds": 1.0}, "parameters": {"trained": 100}, "best": None}
        (folder.path / "adapter").mkdir(exist_ok=True)
        (folder.path / "adapter" / OWN_FILE).write_text("{}")
        folder.write_manifest(content)
        return {"seconds": 1.0}

    def end_job(self) -> None:
        self.asked = True

    ask_to_end = end_job


def _measure(run: RunDir) -> None:
    folder, manifest = run.path, read_manifest(run.path)
    assert manifest is not None
    assert manifest["status"] == TRIAL
    run.write_manifest({**manifest, "status": "finished"})
    rng = np.random.default_rng(manifest["config"]["training"]["seed"])
    right = rng.permutation(ROWS) < quality(manifest["config"]) * ROWS
    targets = np.arange(ROWS) % 2
    scores = np.where((np.arange(2)[None] == targets[:, None]) == right[:, None], 0.9, 0.1)
    result = {
        "rows": ROWS,
        "split": "test",
        "labels": ["a", "b"],
        "metrics": {"accuracy": {}},
        "cost": {"adapter_bytes": 1},
    }
    store_evaluation(folder, folder / "adapter", result, ClassPredictions(0.5, scores, targets))


def in_child(work: Callable[[], None]) -> int:
    """Do some work in a forked process; return its status: minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
