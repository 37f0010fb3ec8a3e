"""Events for people who watch (`progress`) and for the log (`step`)."""

from __future__ import annotations

from graftwerk.training.callbacks.base import Callback, Outcome, StepResult, TrainingLoop
from graftwerk.training.events import Event


class Progress(Callback):
    """Emit a `progress` event after a step, at most every `timing.PROGRESS_SECONDS`, and after the last one."""

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        if trainer.clock.progress_due() or trainer.all_steps_done:
            step, left = trainer.state.step, trainer.seconds_left()
            trainer.emit(Event("progress", step, total=trainer.total_steps, loss=result.loss, left_seconds=left))


class StepLog(Callback):
    """Emit a `step` event with the mean loss of every ``logging_steps`` steps."""

    def __init__(self, logging_steps: int) -> None:
        self.logging_steps = logging_steps

    def on_train_begin(self, trainer: TrainingLoop) -> None:
        self._log_if_due(trainer)

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        if result.outcome is Outcome.APPLIED:
            trainer.state.loss_sum += result.loss
            trainer.state.loss_count += 1
            trainer.state.grad_norm = result.grad_norm
        self._log_if_due(trainer)

    def _log_if_due(self, trainer: TrainingLoop) -> None:
        state = trainer.state
        if not state.loss_count or not (trainer.all_steps_done or state.step % self.logging_steps == 0):
            return
        mean = state.loss_sum / state.loss_count
        state.loss_sum, state.loss_count = 0.0, 0
        trainer.emit(
            Event(
                "step",
                state.step,
                loss=mean,
                learning_rate=trainer.optimizer.param_groups[0]["lr"],
                grad_norm=state.grad_norm,
                epoch=state.step / trainer.steps_per_epoch,
                seconds=trainer.clock.seconds(),
                left_seconds=trainer.seconds_left(),
            )
        )
