"""Evaluate on the validation rows when it is due, and remember which state was best."""

from __future__ import annotations

from contextlib import suppress

from graftwerk.machine import give_back
from graftwerk.tasks.base import Predictions
from graftwerk.training.callbacks.base import Callback, StepResult, TrainingLoop
from graftwerk.training.events import Event
from graftwerk.training.validation import StopEvaluation, is_better, points


class Validation(Callback):
    """Emit an `evaluation` event every ``eval_steps`` steps and at the end; update `TrainState.best`.

    Args:
        eval_steps: Steps from one evaluation to the next; None evaluates once per epoch.
        metric: Metric by which states are compared; None takes the task's best metric.

    Attributes:
        best_predictions: Step and validation predictions of the best state, None if this process did not compute them.
    """

    def __init__(self, eval_steps: int | None, metric: str | None) -> None:
        self.eval_steps, self.metric = eval_steps, metric
        self.best_predictions: tuple[int, Predictions] | None = None

    def is_due(self, trainer: TrainingLoop) -> bool:
        """Return True if the steps done so far end with an evaluation."""
        return trainer.all_steps_done or trainer.state.step % (self.eval_steps or trainer.steps_per_epoch) == 0

    def on_train_begin(self, trainer: TrainingLoop) -> None:
        self._evaluate_if_due(trainer)  # a resumed run makes up for an evaluation that a signal stopped

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        self._evaluate_if_due(trainer)

    def _evaluate_if_due(self, trainer: TrainingLoop) -> None:
        if trainer.validation and self.is_due(trainer) and trainer.state.evaluated != trainer.state.step:
            with suppress(StopEvaluation):
                self._evaluate(trainer)

    def _evaluate(self, trainer: TrainingLoop) -> None:
        state = trainer.state
        trainer.clock.pause()
        give_back()  # the C library keeps what a step freed, in pieces that the blocks of an evaluation do not fit into
        predictions = trainer.evaluate(trainer.validation)
        metrics = points(predictions, trainer.task)
        name = self.metric or trainer.task.best_metric
        value = metrics.get(name)
        better = value is not None and (state.best is None or is_better(name, value, state.best["value"]))
        if better:
            state.best = {"step": state.step, "metric": name, "value": value}
            self.best_predictions = (state.step, predictions)
        state.stale = 0 if better else state.stale + 1
        state.evaluated = state.step
        trainer.saved_step = -1  # this state is saved again, with what the evaluation has changed
        trainer.clock.evaluation_seconds = trainer.clock.pause()
        # first the rows: a search judges an evaluation by them
        trainer.emit(Event("validated", state.step, predictions=predictions))
        trainer.emit(Event("evaluation", state.step, **metrics, best=better, seconds=trainer.clock.seconds()))
        for callback in trainer.callbacks:
            callback.on_evaluation_end(trainer, predictions.loss)
