"""Where a run is: what goes into a checkpoint, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from graftwerk.errors import ConfigError
from graftwerk.modeling.attach import Adapter
from graftwerk.serialization.untrusted_files import understood
from graftwerk.training import optim, rng
from graftwerk.training.checkpoint import STATE, Checkpoints, Snapshot
from graftwerk.training.distributed import Distributed
from graftwerk.training.health_checks import HealthChecks
from graftwerk.training.settings import TrainingSettings


@dataclass
class TrainState:
    """Where a run is. Plain numbers, stored in every checkpoint.

    Attributes: step: Steps done, the skipped ones included. micro_batch: Rows of a micro-batch; smaller than the
        settings say after memory ran out. bad_steps: Steps skipped because loss or gradient were not finite.
        untrained_steps: Steps skipped because none of their rows has a trained token. best:
        ``step``, ``metric`` and ``value`` of the best evaluation so far. stale: Evaluations since the best one.
        evaluated: The step of the last evaluation. loss_sum, loss_count: Of the steps since the last ``step`` event;
        bad ones have events of their own. grad_norm: Of the last good step, before clipping. seconds: Of training so
        far, evaluations and checkpoints included.
    Raises:
        TypeError: a value is not of the type that is written here.
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
            raise TypeError("a count is no whole number")
        if not all(type(number) in (int, float) for number in numbers):
            raise TypeError("a sum is no number")
        if self.best is not None and not (type(self.best) is dict and type(self.best["step"]) is int):
            raise TypeError("`best` names no step")


class Stateful(Protocol):
    """Everything of a trainer that a checkpoint stores or restores."""

    state: TrainState
    adapter: Adapter
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    diagnosis: HealthChecks
    checkpoints: Checkpoints
    processes: Distributed
    settings: TrainingSettings
    device: torch.device
    identity: dict[str, Any]
    total_steps: int
    warmup_steps: int

    @property
    def log_position(self) -> Callable[[], int]:
        """Return the function that tells how many bytes of the log are written."""


def state_dict(trainer: Stateful) -> Snapshot:
    """Everything that the next step depends on. All processes take part: each has random states of its own."""
    count, settings = trainer.processes.world_size, trainer.settings
    gathered = {name: trainer.processes.gather(tensor) for name, tensor in rng.capture(trainer.device).items()}
    schedule = {
        "kind": settings.lr_scheduler_type,
        "total_steps": trainer.total_steps,
        "warmup_steps": trainer.warmup_steps,
    }
    return Snapshot(
        step=trainer.state.step,
        weights=trainer.adapter.state_dict(),
        optimizer=optim.optimizer_tensors(trainer.optimizer),
        rng={f"{process}.{name}": states[process] for name, states in gathered.items() for process in range(count)},
        state={
            **asdict(trainer.state),
            "processes": count,
            "sharing": trainer.processes.shares_rows,
            "schedule": schedule,
            "scaler": trainer.scaler.state_dict(),
            "diagnosis": trainer.diagnosis.state_dict(),
            "log_position": trainer.log_position(),
            "run": trainer.identity,
        },
    )


def load_state_dict(trainer: Stateful, snapshot: Snapshot) -> None:
    """The inverse of `take`.

    Raises:
        ConfigError: the checkpoint was made by another number of processes.
        AdapterError, IntegrityError: its tensors do not belong to this graft.
    """
    values = snapshot.state
    shared = bool(values.get("sharing"))
    if values["processes"] != trainer.processes.world_size or shared != trainer.processes.shares_rows:
        before, now = values["processes"], trainer.processes.world_size
        forked, launched = (
            f"training.processes={before}, in `graftwerk train`",
            f"accelerate launch, {before} processes",
        )
        raise ConfigError(
            f"this run was trained by {before} process{'es' if before != 1 else ''}"
            f"{' that shared its steps' if shared else ' that were launched' if before > 1 else ''} and would go on "
            f"with {now}",
            hint=forked if shared or before == 1 else launched,
        )
    trainer.adapter.load_state_dict(snapshot.weights)
    optim.load_optimizer_tensors(trainer.optimizer, snapshot.optimizer)
    with understood(trainer.checkpoints.path(snapshot.step) / STATE):
        trainer.diagnosis.load_state_dict(values["diagnosis"])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(dict(values["scaler"]))
        known = TrainState.__dataclass_fields__  # one that an older checkpoint lacks has its default
        trainer.state = TrainState(**{name: values[name] for name in known if name in values})
    mine = f"{trainer.processes.rank}."
    states = {name.removeprefix(mine): tensor for name, tensor in snapshot.rng.items() if name.startswith(mine)}
    rng.restore(states, trainer.device)
