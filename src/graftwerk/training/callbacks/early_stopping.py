"""Stop a training whose evaluations no longer get better."""

from __future__ import annotations

from graftwerk.training.callbacks.base import Callback, TrainingLoop
from graftwerk.training.events import Event
from graftwerk.training.trainer_state import TrainState


class EarlyStopping(Callback):
    """End training after ``patience`` evaluations in a row without a new best one.

    Args:
        patience: Number of evaluations; None never stops.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def is_reached(self, state: TrainState) -> bool:
        """Return True if training is to stop."""
        return self.patience is not None and state.stale >= self.patience

    def on_evaluation_end(self, trainer: TrainingLoop, loss: float | None) -> None:
        state = trainer.state
        if self.is_reached(state) and not trainer.all_steps_done:
            best = state.best and state.best["step"]
            text = f"{state.stale} evaluations in a row were no better than step {best}"
            trainer.emit(Event("early_stopping", state.step, text=text))
