"""The callbacks of every training."""

from __future__ import annotations

from graftwerk.training.callbacks.base import Callback
from graftwerk.training.callbacks.early_stopping import EarlyStopping
from graftwerk.training.callbacks.health_checks import HealthChecks
from graftwerk.training.callbacks.progress import Progress, StepLog
from graftwerk.training.callbacks.skipped_steps import SkippedSteps
from graftwerk.training.callbacks.unreached_layers import UnreachedLayers
from graftwerk.training.callbacks.validation import Validation
from graftwerk.training.settings import TrainingSettings


def default_callbacks(
    settings: TrainingSettings, health: HealthChecks, evaluations: Validation, early_stopping: EarlyStopping
) -> list[Callback]:
    """Return the callbacks of a training, in the order of their events in the log.

    Args:
        settings: Training settings.
        health: Health checks of the loss and the gradient.
        evaluations: Evaluation of the validation rows.
        early_stopping: Early stopping; it reads the result of ``evaluations``, and so comes last.
    """
    return [
        SkippedSteps(settings.max_bad_steps),
        UnreachedLayers(),
        health,
        Progress(),
        StepLog(settings.logging_steps),
        evaluations,
        early_stopping,
    ]
