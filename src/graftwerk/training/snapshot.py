"""The state of a training as a checkpoint, and back."""

from __future__ import annotations

from dataclasses import asdict

from graftwerk.errors import ConfigError
from graftwerk.serialization.untrusted_files import understood
from graftwerk.training import optim, rng
from graftwerk.training.callbacks.base import TrainingLoop
from graftwerk.training.checkpoint import Snapshot
from graftwerk.training.run_dir import STATE
from graftwerk.training.trainer_state import TrainState


def state_dict(trainer: TrainingLoop) -> Snapshot:
    """Return everything that the next step depends on.

    All processes take part: each has random states of its own.
    """
    count, settings = trainer.distributed.world_size, trainer.settings
    gathered = {name: trainer.distributed.gather(tensor).cpu() for name, tensor in rng.capture(trainer.device).items()}
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
            "sharing": trainer.distributed.shares_rows,
            "schedule": schedule,
            "scaler": trainer.scaler.state_dict(),
            **{callback.state_key: callback.state_dict() for callback in trainer.callbacks if callback.state_key},
            "log_position": trainer.log_position(),
            "run": trainer.identity,
        },
    )


def load_state_dict(trainer: TrainingLoop, snapshot: Snapshot) -> None:
    """Load everything that `state_dict` returned.

    Args:
        trainer: Training of the same run, on the same number of processes.
        snapshot: Checkpoint to load.

    Raises:
        ConfigError: The checkpoint was made by another number of processes.
        AdapterError, IntegrityError: Its tensors do not belong to this adapter.
    """
    values = snapshot.state
    _check_processes(trainer, int(values["processes"]), bool(values.get("sharing")))
    trainer.adapter.load_state_dict(snapshot.weights)
    optim.load_optimizer_tensors(trainer.optimizer, snapshot.optimizer)
    with understood(trainer.checkpoints.path(snapshot.step) / STATE):
        for callback in trainer.callbacks:
            if callback.state_key:
                callback.load_state_dict(values[callback.state_key])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(dict(values["scaler"]))
        known = TrainState.__dataclass_fields__  # one that an older checkpoint lacks has its default
        trainer.state = TrainState(**{name: values[name] for name in known if name in values})
    mine = f"{trainer.distributed.rank}."
    states = {name.removeprefix(mine): tensor for name, tensor in snapshot.rng.items() if name.startswith(mine)}
    rng.restore(states, trainer.device)


def load_best_state(trainer: TrainingLoop) -> int:
    """Load the best evaluated state into the adapter if the settings say so.

    Returns:
        The step of the state that the adapter has now.
    """
    best, step = trainer.state.best, trainer.state.step
    if not trainer.settings.load_best or best is None or best["step"] == step:
        return step
    trainer.adapter.load_state_dict(trainer.checkpoints.weights(best["step"]))
    return int(best["step"])


def _check_processes(trainer: TrainingLoop, before: int, shared: bool) -> None:
    """Raise ConfigError unless the checkpoint has the random states of as many processes as train now."""
    now = trainer.distributed.world_size
    if (before, shared) == (now, trainer.distributed.shares_rows):
        return
    launched = " that shared its steps" if shared else " that were launched" if before > 1 else ""
    forked = f"training.processes={before}, in `graftwerk train`"
    raise ConfigError(
        f"this run was trained by {before} process{'es' if before != 1 else ''}{launched} and would be resumed with "
        f"{now}",
        hint=forked if shared or before == 1 else f"accelerate launch, {before} processes",
    )
