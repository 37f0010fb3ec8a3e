"""Health checks: problems of a run, reported while it runs and with a hint.

Three problems are looked for, each reported once. Losses are noisy, so everything is judged on means over windows:

- ``no_learning``: after the warm-up and enough steps the loss is still that of the start, or that of a model that
  knows only the frequency of each label. Typically a learning rate that fits full fine-tuning.
- ``overfitting``: the validation loss has risen at two evaluations in a row while the training loss fell.
- ``divergence``: the loss is far above where it started.

The state is plain numbers, so that it goes into checkpoints and a resumed run reports what an undisturbed one would
have reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graftwerk.training.callbacks.base import Callback, Outcome, StepResult, TrainingLoop
from graftwerk.training.events import Event

WINDOW = 20
"""Steps whose mean loss is compared; at a batch of 16 that is 320 rows."""
START = 5
"""Steps whose mean is the loss at the start."""
ENOUGH_STEPS = 60
"""Steps before which `no_learning` is not reported..."""
ENOUGH_SHARE = {"usual": 0.6, "strange": 0.3}
"""...nor before this share of the run; earlier if the rate is far from the method's own, which explains it."""
LEARNT = 0.015
"""Share of the reference loss by which the loss must have fallen to count as learning: about twice the standard error
of a window's mean in batches of 16, as long as a model has learnt nothing."""
FAR_ABOVE = 1.5
"""Times the reference loss that counts as divergence."""
RISE = 0.01
"""Relative rise of the validation loss from one evaluation to the next that counts."""


@dataclass
class _Memory:
    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    since_evaluation: list[float] = field(default_factory=list)
    """Sum and number of training losses since the last evaluation."""
    trained: list[float] = field(default_factory=list)
    """Mean training loss before each evaluation."""
    validated: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class HealthChecks(Callback):
    """Emit events of kind ``diagnosis`` with ``code``, ``text`` and ``hint``, from the losses of training.

    Args:
        total_steps: Steps of the run.
        warmup_steps: Steps in which the learning rate rises.
        learning_rate: Peak rate of the method in this run.
        default_learning_rate: Default rate of the method.
        method: Name of the method, for the hint.
        prior_loss: Loss of a model that predicts the frequency of each label for any input, or None if the task has
            no labels.
    """

    state_key = "diagnosis"

    def __init__(
        self,
        *,
        total_steps: int,
        warmup_steps: int,
        learning_rate: float,
        default_learning_rate: float,
        method: str,
        prior_loss: float | None = None,
    ) -> None:
        self.total, self.warmup = total_steps, warmup_steps
        self.rate, self.default_rate, self.method = learning_rate, default_learning_rate, method
        self.prior_loss = prior_loss
        self._memory = _Memory(since_evaluation=[0.0, 0.0])

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory = _Memory(**state)

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        if result.outcome is not Outcome.UNTRAINED:
            for event in self.after_step(trainer.state.step, result.loss):
                trainer.emit(event)

    def on_evaluation_end(self, trainer: TrainingLoop, loss: float | None) -> None:
        for event in self.after_evaluation(trainer.state.step, loss):
            trainer.emit(event)

    def after_step(self, step: int, loss: float) -> list[Event]:
        """Return the events after a step."""
        memory = self._memory
        if not math.isfinite(loss):
            return []
        if len(memory.first) < START:
            memory.first.append(loss)
        memory.recent.append(loss)
        del memory.recent[:-WINDOW]
        memory.since_evaluation[0] += loss
        memory.since_evaluation[1] += 1
        if len(memory.recent) < WINDOW:
            return []
        recent = sum(memory.recent) / WINDOW
        start = sum(memory.first) / len(memory.first)
        reference = max(start, self.prior_loss or 0.0)
        if recent > FAR_ABOVE * reference:
            return self._say("divergence", step, *self._diverging(recent, reference))
        known = start if self.prior_loss is None else min(start, self.prior_loss)
        if self._long_enough(step) and recent > (1 - LEARNT) * known:
            return self._say("no_learning", step, *self._not_learning(step, recent, known))
        return []

    def after_evaluation(self, step: int, loss: float | None) -> list[Event]:
        """Return the events after an evaluation.

        Args:
            step: Steps done.
            loss: Validation loss, or None if the task has none.
        """
        memory = self._memory
        total, count = memory.since_evaluation
        if loss is None or not math.isfinite(loss) or not count:
            return []
        memory.trained.append(total / count)
        memory.validated.append(loss)
        memory.since_evaluation = [0.0, 0.0]
        del memory.trained[:-3], memory.validated[:-3]
        if len(memory.validated) < 3:
            return []
        rising = all(b > a * (1 + RISE) for a, b in zip(memory.validated, memory.validated[1:], strict=False))
        falling = all(b < a for a, b in zip(memory.trained, memory.trained[1:], strict=False))
        if not (rising and falling):
            return []
        return self._say(
            "overfitting",
            step,
            f"the validation loss rises ({_row(memory.validated)}) while the training loss falls "
            f"({_row(memory.trained)}): "
            "the model memorizes these rows",
            "fewer epochs or training.early_stopping_patience=1; more rows; a smaller adapter, more dropout or "
            "weight decay. "
            "With training.load_best the best evaluated state is saved in any case",
        )

    def _long_enough(self, step: int) -> bool:
        strange = not self.default_rate / 3 <= self.rate <= self.default_rate * 10
        share = ENOUGH_SHARE["strange" if strange else "usual"]
        return step >= max(ENOUGH_STEPS, math.ceil(share * self.total), self.warmup + WINDOW)

    def _say(self, code: str, step: int, text: str, hint: str) -> list[Event]:
        if code in self._memory.said:
            return []
        self._memory.said.append(code)
        return [Event("diagnosis", step, code=code, text=text, hint=hint)]

    def _diverging(self, recent: float, reference: float) -> tuple[str, str]:
        lower = min(self.rate / 5, self.default_rate)
        return (
            f"the loss has risen to {recent:.3g}, far above the {reference:.3g} it started from: training diverges",
            (
                f"training.learning_rate={lower:.1g} (it is {self.rate:.3g}, the default of {self.method} is "
                f"{self.default_rate:.3g}), a longer training.warmup_ratio, or training.max_grad_norm=1"
            ),
        )

    def _not_learning(self, step: int, recent: float, known: float) -> tuple[str, str]:
        knows = "a model that only knows the frequency of each label" if known == self.prior_loss else "the start"
        if self.rate < self.default_rate / 3:
            hint = (
                f"training.learning_rate=auto: {self.rate:.3g} is {self.default_rate / self.rate:.0f} times "
                f"lower than the "
                f"{self.default_rate:.3g} that {self.method} is known to need; small methods want far higher "
                f"rates than full fine-tuning"
            )
        elif self.rate > self.default_rate * 10:
            hint = (
                f"training.learning_rate=auto: {self.rate:.3g} is far above the {self.default_rate:.3g} that "
                f"{self.method} needs"
            )
        else:
            hint = (
                f"try training.learning_rate={self.rate * 5:.1g} and {self.rate / 5:.1g}; check that the labels "
                f"belong to their rows; "
                "a larger adapter or another method"
            )
        return (
            (
                f"after {step} steps the loss ({recent:.3g}) is no better than that of {knows} ({known:.3g}): "
                "the model has not learned"
            ),
            hint,
        )


def _row(values: list[float]) -> str:
    return (
        " > ".join(f"{value:.3f}" for value in values)
        if values[0] > values[-1]
        else " < ".join(f"{v:.3f}" for v in values)
    )


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
