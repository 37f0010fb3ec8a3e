"""The protocol of callbacks: three fixed points of the loop, and state that goes into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.base import Example, Task
from graftwerk.training.batch_sampler import BatchSampler
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.distributed import Distributed
from graftwerk.training.events import Event
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.timing import Clock
from graftwerk.training.trainer_state import TrainState
from graftwerk.training.validation import Evaluator


class TrainingLoop(Protocol):
    """The parts of a `Trainer` that callbacks and checkpoints read and change; `Trainer` documents them."""

    adapter: Adapter
    task: Task
    settings: TrainingSettings
    validation: Sequence[Example]
    state: TrainState
    callbacks: list[Callback]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    checkpoints: Checkpoints
    distributed: Distributed
    evaluate: Evaluator
    clock: Clock
    device: torch.device
    identity: dict[str, Any]
    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    rows_per_step: int
    batch_sampler: BatchSampler
    parameters: list[torch.nn.Parameter]
    saved_step: int

    @property
    def emit(self) -> Callable[[Event], None]:
        """Listener of events."""

    @property
    def log_position(self) -> Callable[[], int]:
        """Function that forces the event log to the disk and returns its size in bytes."""

    @property
    def all_steps_done(self) -> bool:
        """True once all steps are done."""

    @property
    def evaluation_due(self) -> bool:
        """True if the steps done so far end with an evaluation."""

    def seconds_left(self) -> float | None:
        """Estimate the seconds to the end of the training."""


class Outcome(Enum):
    """Result of one optimizer step."""

    APPLIED = "the optimizer updated the parameters"
    UNTRAINED = "skipped: no row of the step has a trained token"
    OVERFLOW = "skipped: float16 overflowed, and the scaler lowers its scale"
    NOT_FINITE = "skipped: the loss or the gradient is not finite"


@dataclass(frozen=True)
class StepResult:
    """One step that was taken or skipped.

    Attributes:
        loss: Mean loss over the targets of the step, on all processes.
        grad_norm: Norm of the gradient before clipping.
        outcome: Applied, or the reason for skipping it.
    """

    loss: float
    grad_norm: float
    outcome: Outcome


class Callback:
    """Base class of callbacks; every hook does nothing unless it is overridden.

    Hooks run inside `rng.untouched`: random numbers drawn in them do not change training. They report to users by
    ``trainer.emit(Event(...))``.

    Attributes:
        state_key: Name of the callback's state in checkpoints; None for a callback without state.
    """

    state_key: str | None = None

    def on_train_begin(self, trainer: TrainingLoop) -> None:
        """Run before the first step, of a resumed run as well."""

    def on_step_end(self, trainer: TrainingLoop, result: StepResult) -> None:
        """Run after each step, `trainer.state.step` steps being done."""

    def on_evaluation_end(self, trainer: TrainingLoop, loss: float | None) -> None:
        """Run after each evaluation, given the validation loss, None if the task has none."""

    def is_reached(self, state: TrainState) -> bool:
        """Return True if training is to stop."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the values that `state_dict` returned.

        Raises:
            TypeError: The state is of another form.
        """
