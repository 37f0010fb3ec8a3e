"""Warn about trained layers that the model never calls."""

from __future__ import annotations

from graftwerk.training.callbacks.base import Callback, Outcome, StepResult, TrainingLoop
from graftwerk.training.events import Event


class UnreachedLayers(Callback):
    """Emit a warning if the first step's gradient did not reach every layer of the adapter."""

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        if trainer.state.step != 1 or result.outcome is not Outcome.APPLIED or trainer.adapter.method.kind != "layer":
            return
        named = list(trainer.adapter.named_parameters())
        without = [key for key, parameter in named if parameter.grad is None]
        if without:
            text = (
                f"{len(without)} of {len(named)} trained tensors got no gradient in the first step, {without[0]} for "
                "instance: the model did not call their layers, so they stay as they are"
            )
            hint = "leave these layers out with method.target_modules, if the data never reach them"
            trainer.emit(Event("warning", trainer.state.step, text=text, hint=hint))
