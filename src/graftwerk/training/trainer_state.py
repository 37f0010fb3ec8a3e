"""`TrainState`: the plain numbers of a training, stored in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """State of a run between two steps.

    Attributes:
        step: Steps done, skipped ones included.
        micro_batch: Rows of a micro-batch; fewer than the settings say after memory ran out.
        bad_steps: Steps skipped because loss or gradient were not finite.
        best: ``step``, ``metric`` and ``value`` of the best evaluation so far; None before the first.
        stale: Evaluations since the best one.
        evaluated: Step of the last evaluation.
        loss_sum: Sum of the losses of the steps since the last ``step`` event; skipped steps do not count.
        loss_count: Number of those steps.
        grad_norm: Gradient norm of the last applied step, before clipping.
        seconds: Seconds of training so far, evaluations and checkpoints included.
        untrained_steps: Steps skipped because none of their rows has a trained token.

    Raises:
        TypeError: A value has another type than the one declared here.
    """

    step: int
    micro_batch: int
    bad_steps: int = 0
    best: dict[str, Any] | None = None
    stale: int = 0
    evaluated: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0
    untrained_steps: int = 0

    def __post_init__(self) -> None:
        counts = (self.step, self.micro_batch - 1, self.bad_steps, self.stale, self.evaluated, self.loss_count)
        numbers = (self.loss_sum, self.grad_norm, self.seconds)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("a count is not a whole number")
        if not all(type(number) in (int, float) for number in numbers):
            raise TypeError("a sum is not a number")
        if self.best is not None and not (type(self.best) is dict and type(self.best["step"]) is int):
            raise TypeError("`best` names no step")
