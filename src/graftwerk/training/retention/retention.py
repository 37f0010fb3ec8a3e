"""The strategies of a run together: started before the first step, part of every step, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from graftwerk.training.callbacks.base import Callback, StepResult, TrainingLoop
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retention.base import Setting, Strategy
from graftwerk.training.retention.consolidation import Consolidation
from graftwerk.training.retention.distillation import Distillation
from graftwerk.training.retention.early_stopping import RetainedStop
from graftwerk.training.retention.replay import Replay
from graftwerk.training.retention.self_replay import SelfReplay
from graftwerk.training.settings import RetainSettings
from graftwerk.training.step_batches import PreparedStep
from graftwerk.training.trainer_state import TrainState


class Retention(Callback):
    """Add the losses of all strategies to every step.

    Attributes:
        strategies: The strategies, in the order in which their losses are added.
        watch: The one of them that may end the training, or None.
    """

    state_key = "retention"

    def __init__(self, settings: RetainSettings, setting: Setting) -> None:
        self.strategies: list[Strategy] = []
        if settings.replay is not None:
            self.strategies.append(Replay(setting, settings.replay))
        if settings.self_replay is not None:
            self.strategies.append(SelfReplay(setting, settings.self_replay))
        if settings.distillation is not None:
            self.strategies.append(Distillation(setting, settings.distillation))
        if settings.consolidation is not None:
            self.strategies.append(Consolidation(setting, settings.consolidation))
        self.watch = None if settings.early_stopping is None else RetainedStop(setting, settings.early_stopping)
        if self.watch is not None:
            self.strategies.append(self.watch)
        self.seconds = self.start_seconds = 0.0
        self._trainer: TrainingLoop | None = None

    def start(self, trainer: TrainingLoop) -> None:
        """Prepare all strategies on the model as it is before the first step.

        Raises:
            ConfigError, UnsupportedError: As `Strategy.start`.
            StopEvaluation, DivergedError: As `RetainedMeter.measure`.
        """
        began = time.perf_counter()
        for strategy in self.strategies:
            (strategy.hold if strategy.setting.planned else strategy.start)()
        self._trainer, self.start_seconds = trainer, time.perf_counter() - began

    def losses(self, own: PreparedStep, gradients: GradientAccumulator) -> Iterator[Tensor]:
        """Yield the losses (scalars) of a step, each to be propagated before the next is computed.

        Args:
            own: The batches of the run's own rows.
            gradients: The accumulator of the step.
        """
        assert self._trainer is not None
        began = time.perf_counter()
        for strategy in self.strategies:
            yield from strategy.losses(self._trainer.state.step, own, gradients)
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, trainer: TrainingLoop) -> None:
        if self.watch is not None:
            began = time.perf_counter()
            self.watch.look(trainer)
            self.seconds += time.perf_counter() - began

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        self.on_train_begin(trainer)

    def is_reached(self, state: TrainState) -> bool:
        return self.watch is not None and self.watch.exceeded

    def cost(self) -> dict[str, Any]:
        """Return what the strategies cost: seconds before the first step and in all steps, bytes held."""
        return {
            "strategies": {strategy.name: strategy.bytes for strategy in self.strategies},
            "start_seconds": self.start_seconds,
            "step_seconds": self.seconds,
            "bytes": sum(strategy.bytes for strategy in self.strategies),
        }

    def state_dict(self) -> dict[str, Any]:
        found = {} if self.watch is None else {self.watch.name: self.watch.state_dict()}
        return {"seconds": self.seconds, **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if type(state["seconds"]) not in (int, float):
            raise TypeError("`seconds` is not a number")
        self.seconds = float(state["seconds"])
        if self.watch is not None:
            self.watch.load_state_dict(state[self.watch.name])
