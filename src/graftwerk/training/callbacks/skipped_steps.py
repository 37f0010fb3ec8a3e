"""Steps that the optimizer does not see: counted, reported, and too many of them end the run."""

from __future__ import annotations

import math

from graftwerk.errors import DivergedError
from graftwerk.evaluation.inference import refuse_broken_base
from graftwerk.training.callbacks.base import Callback, Outcome, StepResult, TrainingLoop
from graftwerk.training.events import Event

DIVERGED_HINT = "a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm=1"


class SkippedSteps(Callback):
    """Count skipped steps in `TrainState.bad_steps` and `TrainState.untrained_steps`.

    Args:
        max_bad_steps: Steps with a non-finite loss or gradient that are skipped before the run ends.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        """Report a skipped step.

        Raises:
            DivergedError: More than `max_bad_steps` steps were not finite.
            ModelError: Weights of the base are not finite.
        """
        state = trainer.state
        if result.outcome is Outcome.UNTRAINED:
            state.untrained_steps += 1
            if state.untrained_steps == 1:
                text = "no row of this step has a trained token; such steps are skipped and counted"
                trainer.emit(Event("warning", state.step, text=text))
        if result.outcome is not Outcome.NOT_FINITE:
            return
        refuse_broken_base(trainer.adapter.model, trained=state.bad_steps + 1 == state.step)
        state.bad_steps += 1
        subject = "gradient" if math.isfinite(result.loss) else "loss"
        if state.bad_steps > self.max_bad_steps:
            raise DivergedError(
                f"the {subject} of step {state.step} is not finite, and {self.max_bad_steps} such steps have been "
                "skipped already",
                where=f"step {state.step} of {trainer.total_steps}",
                hint=DIVERGED_HINT,
                recovered=trainer.checkpoints.recoverable(),
            )
        text = f"the {subject} is not finite; this step is skipped ({state.bad_steps} of at most {self.max_bad_steps})"
        trainer.emit(Event("bad_step", state.step, text=text, loss=result.loss, grad_norm=result.grad_norm))
