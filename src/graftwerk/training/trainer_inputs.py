"""The rows that a `Trainer` learns from, and the run that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwerk.data.mixture import Sampler
from graftwerk.tasks.base import Example
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Listener
from graftwerk.training.signals import StopSignals


@dataclass(frozen=True)
class TrainingData:
    """Encoded rows, and what is known about them as a whole.

    Attributes:
        train: Encoded training rows.
        validation: Encoded validation rows; without any, nothing is evaluated and the last state is the best.
        labels: Class names by id, which `training.class_weights` refers to.
        max_length: Tokens of a packed row; None means the length of the longest row.
        prior_loss: As for `HealthChecks`.
        sampler: Sampler of each epoch's rows, for several data sets; None takes every row once.
    """

    train: Sequence[Example]
    validation: Sequence[Example] = ()
    labels: Sequence[str] = ()
    max_length: int | None = None
    prior_loss: float | None = None
    sampler: Sampler | None = None


@dataclass(frozen=True)
class RunContext:
    """The run that a training belongs to: where states and events go, and what may stop it.

    Attributes:
        checkpoints: Checkpoints to save states in.
        emit: Listener of every event.
        stop: Stop signals, checked between steps, during an evaluation and while the activation cache is filled.
        identity: Settings, data and base model of the run; stored in checkpoints unchanged.
        shared_cache: Folder of hidden states of frozen layers shared with other runs, or None for no sharing.
    """

    checkpoints: Checkpoints
    emit: Listener = lambda event: None
    stop: StopSignals = field(default_factory=StopSignals)
    identity: Mapping[str, Any] = field(default_factory=dict)
    shared_cache: Path | None = None
