"""The callbacks of every training."""

from __future__ import annotations

from graftwerk.methods.learning_rates import default_learning_rates
from graftwerk.training import optim
from graftwerk.training.callbacks.base import Callback, TrainingLoop
from graftwerk.training.callbacks.early_stopping import EarlyStopping
from graftwerk.training.callbacks.health_checks import HealthChecks, UnreachedLayers
from graftwerk.training.callbacks.progress import Progress, StepLog
from graftwerk.training.callbacks.skipped_steps import SkippedSteps
from graftwerk.training.callbacks.validation import Validation


def default_callbacks(
    trainer: TrainingLoop, evaluations: Validation, early_stopping: EarlyStopping, prior_loss: float | None
) -> list[Callback]:
    """Return the callbacks of a training, in the order of their events in the log.

    Args:
        trainer: The training, its schedule known.
        evaluations: Evaluation of the validation rows.
        early_stopping: Early stopping; it reads the result of ``evaluations``, and so comes last.
        prior_loss: As for `HealthChecks`.
    """
    settings, method, task = trainer.settings, trainer.adapter.method, trainer.task
    health = HealthChecks(
        total_steps=trainer.total_steps,
        warmup_steps=trainer.warmup_steps,
        learning_rate=optim.peak_rates(trainer.adapter, settings, task).method,
        default_learning_rate=default_learning_rates(method, task.name)[0],
        method=method.name,
        prior_loss=prior_loss,
    )
    return [
        SkippedSteps(settings.max_bad_steps),
        UnreachedLayers(),
        health,
        Progress(),
        StepLog(settings.logging_steps),
        evaluations,
        early_stopping,
    ]
