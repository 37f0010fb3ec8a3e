"""Jobs of a comparison, each in its own process: the check before the first run, and the runs themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwerk.errors import ConflictError, GraftwerkError

Send = Callable[[dict[str, Any]], None]
FORWARDED = frozenset(
    {
        "phase",
        "start",
        "progress",
        "evaluation",
        "resume",
        "early_stopping",
        "diagnosis",
        "bad_step",
        "memory",
        "warning",
        "unfit",
    }
)


def perform(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Do a job: plain values in, plain values out.

    Raises:
        GraftwerkError: whatever is wrong with it.
    """
    return {"check": _check, "run": _run, "trial": _trial}[job["kind"]](job, send)


def _check(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Check all that can be wrong before a model is loaded.

    That is: rows, model, each method on this architecture, memory (of those named in ``memory``, or of all), and
    existing runs.

    Returns:
        ``rows``, ``labels``, ``findings``, ``summary`` of the rows, and each method's ``parameters``, by formula.
    """
    from graftwerk.config import RunConfig
    from graftwerk.experiments.preflight import count_parameters
    from graftwerk.models.hardware import device_name, set_threads
    from graftwerk.models.load import load_config
    from graftwerk.models.quantization import require_bitsandbytes
    from graftwerk.training.callbacks.trackers import check_trackers
    from graftwerk.training.data_summary import summary_of
    from graftwerk.training.manifest import versions
    from graftwerk.training.planning.memory_check import check_memory
    from graftwerk.training.setup import max_length_of, prepare, with_initial_text

    configs = {name: RunConfig.build(dict(tree)) for name, tree in job["configs"].items()}
    first = next(iter(configs.values()))
    check_trackers(first.training.report_to)
    if first.quantization is not None:
        require_bitsandbytes()
    send({"event": {"kind": "phase", "step": 0, "name": "checking rows and methods"}})
    prepared = prepare(first, lambda event: None)
    parameters: dict[str, Any] = {}
    for name, config in configs.items():
        architecture = load_config(config.model, config.revision)  # counting writes into it
        try:
            max_length_of(config, architecture, prepared.tokenizer)
            parameters[name] = count_parameters(config.method, prepared.task, architecture, prepared.splits)
            own = replace(prepared, method=with_initial_text(config.method, prepared.tokenizer))
            if name in job.get("memory", configs):
                check_memory(config, own, None, lambda event: None)
        except GraftwerkError as error:
            error.where = f"method `{name}`" + (f": {error.where}" if error.where else "")
            raise
    for folder, tree in job["runs"].items():
        config = RunConfig.build(dict(tree))
        same_draw = config.data.train_seed == first.data.train_seed
        _refuse_another_run(Path(folder), config, prepared.splits.fingerprint if same_draw else None)
    return {
        "rows": {name: len(examples) for name, examples in prepared.examples.items()},
        "labels": list(prepared.splits.labels or ()),
        "fingerprint": prepared.splits.fingerprint,
        "origin": prepared.splits.origin,
        "findings": prepared.findings,
        "summary": summary_of(prepared),
        "parameters": parameters,
        "main_metric": prepared.task.main_metric,
        "machine": {"device": device_name(), "threads": set_threads()},
        "versions": versions(prepared, first),
    }


def _refuse_another_run(folder: Path, config: Any, fingerprint: str | None) -> None:
    """Raise ConflictError if a folder holds a run with other settings or other rows, finished or not.

    Args:
        folder: The folder.
        config: Settings of the run that it is for.
        fingerprint: Of the rows, or None for a run whose rows were not read.
    """
    from graftwerk.config import RunConfig
    from graftwerk.training.resume_check import differences
    from graftwerk.training.run_dir import CONFIG, read_manifest

    manifest = read_manifest(folder)
    if manifest is None or not (folder / CONFIG).is_file():
        return
    before = RunConfig.load(folder / CONFIG)
    changed = differences({"config": before.model_dump(mode="json")}, {"config": config.model_dump(mode="json")})
    if not changed and fingerprint is not None and manifest.get("data", {}).get("fingerprint") != fingerprint:
        changed = ["the rows themselves"]
    if changed:
        raise ConflictError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}",
            hint="another output_dir for another comparison; or overwrite=True (--overwrite) to train all of it again",
            recovered=str(folder),
        )


def _run(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train to the end (or resume where it stopped), then measure what was stored, row by row.

    A trial is trained and measured on validation rows; nothing else of it is measured.
    """
    from graftwerk.config import RunConfig
    from graftwerk.evaluation.evaluate import evaluate
    from graftwerk.evaluation.results_io import load_evaluation
    from graftwerk.machine import process_start
    from graftwerk.reporting.html import write_report
    from graftwerk.training.train import run_training

    def listener(event: Any) -> None:
        if event.kind in FORWARDED:
            send({"event": event.as_dict()})

    config = RunConfig.build(dict(job["config"]))
    began = time.monotonic()
    run = run_training(
        config,
        resume=not job["overwrite"],
        overwrite=job["overwrite"],
        listener=listener,
        started_at=process_start(),
        shared_cache=Path(job["trunk"]),
        trial=job["trial"],
    )
    if not job["trial"] and load_evaluation(run.folder, run.adapter) is None:
        send({"event": {"kind": "phase", "step": 0, "name": "measuring"}})
        evaluate(run, store=True, quiet=True)
    write_report(run.folder)
    return {"seconds": time.monotonic() - began}


def _trial(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train to the end (or resume where it stopped), without a look at the test rows.

    A job with ``rows`` sends the score of each validation row after each evaluation.
    """
    from graftwerk.config import RunConfig
    from graftwerk.evaluation.metrics import row_scores
    from graftwerk.machine import process_start
    from graftwerk.training.train import run_training

    def listener(event: Any) -> None:
        if event.kind == "validated" and job["rows"]:
            send({"event": {"kind": "rows", "step": event.step, "rows": row_scores(event.values["predictions"])}})
        if event.kind in FORWARDED:
            send({"event": event.as_dict()})

    began = time.monotonic()
    run_training(
        RunConfig.build(dict(job["config"])),
        resume=True,
        listener=listener,
        started_at=process_start(),
        shared_cache=Path(job["trunk"]),
        trial=True,
    )
    return {"seconds": time.monotonic() - began}
