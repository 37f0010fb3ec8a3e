"""End of a run: the best state in the adapter folder, its metrics with intervals, the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, RunInterrupted
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.own_files import refuse_link
from graftwerk.serialization.base_digests import KEY
from graftwerk.tasks.base import Predictions
from graftwerk.training.base_proof import changed_tensors
from graftwerk.training.events import Event
from graftwerk.training.head_start import finish_head
from graftwerk.training.manifest import compute_of
from graftwerk.training.multitask_sampling import drawn
from graftwerk.training.retained import RetainedMeter
from graftwerk.training.row_analysis import RowAnalysis
from graftwerk.training.run_dir import TRIAL, RunDir
from graftwerk.training.setup import Prepared
from graftwerk.training.snapshot import load_best_state
from graftwerk.training.trainer import Trainer
from graftwerk.training.validation import StopEvaluation

IN_METADATA = (
    "model",
    "base_fingerprint",
    "task",
    "task_settings",
    "labels",
    "max_length",
    "compute",
    "data",
    "metrics",
    "parameters",
    "cost",
    "best",
    "retained",
    "seed",
    "command",
    "versions",
    "graftwerk",
)
"""Keys of the manifest that are stored with the adapter."""


def finish(
    trainer: Trainer,
    prepared: Prepared,
    settings: RunConfig,
    folder: RunDir,
    manifest: dict[str, Any],
    cost: Mapping[str, Any],
    retained: RetainedMeter,
    *,
    trial: bool = False,
) -> None:
    """Load the best state, evaluate it, save it, report it. All processes take part; one writes.

    Args:
        trainer: Trainer that has trained.
        prepared: Rows, task and method.
        settings: Settings of the run.
        folder: The run folder.
        manifest: Manifest of the start; filled in place. It has the costs of a trial that is resumed.
        cost: ``peak_memory_bytes`` of training, above the memory held before the model was loaded, and
            ``first_step_seconds``, the seconds to the end of the first step, each None if not known; and what was
            planned (`planning.memory_check.planned_cost`).
        retained: Measures what is to be retained; it has done so before the first step.
        trial: Leave the test rows alone; the run has the status `TRIAL` until it is resumed.

    Raises:
        RunInterrupted: A signal came; a resumed run does all of this again.
        ResourceError: The adapter cannot be written; the checkpoints are intact.
    """
    from graftwerk.evaluation.cost import size_on_disk
    from graftwerk.evaluation.metrics import metrics_by_set, metrics_of
    from graftwerk.evaluation.sample_outputs import before_and_after, of_base
    from graftwerk.serialization.folder import save_adapter

    trainer.emit(Event("phase", trainer.state.step, name="evaluating"))
    step = load_best_state(trainer)
    prepared = finish_head(trainer, prepared)
    model, analysis = trainer.adapter.model, RowAnalysis(folder, manifest, settings.evaluation)
    for split in ("validation",) if trial else ("validation", "test"):
        if not prepared.examples[split]:
            continue
        predictions = _predictions(trainer, prepared, split, step, settings.evaluation)
        if split == "validation":
            task, predictions = prepared.task.tuned(predictions)
            prepared, trainer.evaluate.task = replace(prepared, task=task), task
        options: dict[str, Any] = {
            "labels": prepared.splits.labels,
            "names": prepared.task.metrics,
            "confidence": settings.evaluation.confidence,
            "resamples": settings.evaluation.resamples,
        }
        manifest["metrics"][split] = metrics_of(predictions, **options)
        if by_set := metrics_by_set(predictions, **options):
            manifest.setdefault("metrics_by_set", {})[split] = by_set
        base = None
        if settings.evaluation.baseline:
            base = of_base(model, partial(_predict, trainer, prepared, split, settings.evaluation))
            manifest.setdefault("baseline", {})[split] = metrics_of(base, **options)
        if trainer.distributed.is_main:  # of test rows if there are any: they come last
            analysis.add(split, prepared.task, predictions, prepared.examples[split], prepared.splits)
            manifest["examples"] = before_and_after(
                model,
                prepared.task,
                prepared.examples[split],
                prepared.tokenizer,
                settings.evaluation,
                predictions,
                dtype=trainer.evaluate.dtype,
                base=base,
            )
        trainer.distributed.barrier()
    if retained.entries and not trial:
        with _stoppable(trainer):
            manifest["retained"] = retained.finish(folder.path, write=trainer.distributed.is_main)
    if (shares := drawn(trainer)) is not None:
        manifest["data"]["sets"] = shares
    if not trainer.distributed.is_main:
        return
    analysis.finish(trainer.emit, trainer.state.step)
    _prove_base_unchanged(trainer, manifest[KEY])
    manifest["task_settings"] = prepared.task.to_dict()
    manifest["compute"] = compute_of(trainer)  # with the batch as it was halved where memory ran out
    manifest["best"] = trainer.state.best
    before = manifest["cost"]
    manifest["trunk"] = manifest["trunk"] or trainer.activation_cache.metrics()
    manifest["cost"] = {
        "training_seconds": trainer.state.seconds,
        "steps": trainer.state.step,
        "step_seconds": trainer.clock.mean_step_seconds or before.get("step_seconds"),
        **cost,
        "peak_memory_bytes": max(
            filter(None, (cost["peak_memory_bytes"], before.get("peak_memory_bytes"))), default=None
        ),
        "first_step_seconds": cost["first_step_seconds"] or before.get("first_step_seconds"),
        "processes": trainer.distributed.world_size,
    }
    if untrained := trainer.state.untrained_steps:  # skipped: none of their rows has a trained token
        manifest["cost"]["untrained_steps"] = untrained
    metadata = {name: manifest[name] for name in IN_METADATA if name in manifest}
    trainer.emit(Event("phase", trainer.state.step, name="saving the adapter"))
    refuse_link(folder.adapter)
    save_adapter(trainer.adapter, folder.adapter, metadata=metadata)
    manifest["cost"]["adapter_bytes"] = size_on_disk(folder.adapter)
    manifest["status"] = TRIAL if trial else "finished"
    try:
        folder.write_manifest(manifest)
    except ConfigError:  # rows of a megabyte: examples must not cost the result
        manifest["examples"] = []
        text = "the sample outputs are too long for the manifest and are left out of it"
        trainer.emit(Event("warning", trainer.state.step, text=text))
        folder.write_manifest(manifest)
    trainer.emit(
        Event("finish", trainer.state.step, metrics=manifest["metrics"], cost=manifest["cost"], best=manifest["best"])
    )


def _prove_base_unchanged(trainer: Trainer, proof: dict[str, Any]) -> None:
    """Compare the base with what it was before training; a change is stored, and a warning that names it."""
    proof["changed"] = changed = changed_tensors(trainer.adapter, proof)
    if changed:
        names = ", ".join(list(changed)[:5]) + (", ..." if len(changed) > 5 else "")
        text = f"training changed the base, which no adapter may do: {names} ({len(changed)} of {len(proof['before'])})"
        trainer.emit(Event("warning", trainer.state.step, text=text))


def _predictions(
    trainer: Trainer, prepared: Prepared, split: str, step: int, evaluation: EvaluationSettings
) -> Predictions:
    """Return the predictions of the evaluation that found the best state if this process has them, else new ones."""
    generation = evaluation if prepared.task.generates and evaluation.generate else None
    if (
        generation is None
        and split == "validation"
        and (best := trainer.evaluations.best_predictions) is not None
        and best[0] == step
    ):
        return best[1]
    return _predict(trainer, prepared, split, evaluation)


def _predict(trainer: Trainer, prepared: Prepared, split: str, evaluation: EvaluationSettings) -> Predictions:
    generation = evaluation if prepared.task.generates and evaluation.generate else None
    with _stoppable(trainer):
        return trainer.evaluate(prepared.examples[split], generation)


@contextmanager
def _stoppable(trainer: Trainer) -> Iterator[None]:
    """Turn a signal in the final evaluation into the error that tells how to do the rest."""
    try:
        yield
    except StopEvaluation:
        raise RunInterrupted(
            trainer.stop.signum or 15,
            "stopped in the final evaluation; training itself is done",
            recovered=trainer.checkpoints.recoverable(),
            hint="run the same command with --resume to do the rest",
        ) from None
