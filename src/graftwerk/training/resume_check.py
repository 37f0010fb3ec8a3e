"""The identity of a run, so that resuming it cannot silently become another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftwerk.absolute_paths import with_absolute_paths
from graftwerk.config import RunConfig
from graftwerk.errors import ConflictError
from graftwerk.sanitize import redacted
from graftwerk.serialization.untrusted_files import understood
from graftwerk.training.checkpoint import Checkpoints, Snapshot
from graftwerk.training.run_dir import CONFIG, STATE, RunDir

FREE = (
    "config.output_dir",
    "config.data.allow",
    "config.evaluation.",
    "config.training.check_memory",
    "config.training.per_device_eval_batch_size",
    "config.training.logging_steps",
    "config.training.report_to",
    "config.training.save_total_limit",
    "config.training.load_best",
    "config.training.processes",  # checked with the random states, which are of so many
    "environment.",
)
"""Settings that do not change what is trained, and may therefore differ when a run is resumed."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each difference of two identities that matters, as ``key: old -> new``.

    A setting that an older version did not have, and that is off or left to the machine, is none.
    """
    old, new = (dict(flat(redacted(_from_anywhere(identity)))) for identity in (before, now))
    return [
        f"{key.removeprefix('config.')}: {_value_text(old, key)} -> {_value_text(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE)
        and (key not in new or (_asks(new[key]) if key not in old else old[key] != new[key]))
    ]


def _asks(value: object) -> bool:
    """Return True if a setting asks for something: it is neither off nor left to the machine."""
    return value is not None and value is not False and value != "auto"


def _from_anywhere(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make the paths absolute: the same file is the same, and an older run may have stored relative ones."""
    config = identity.get("config")
    return {**identity, "config": with_absolute_paths(config)} if isinstance(config, Mapping) else identity


def environment_warning(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a warning about differences that do not forbid resuming but make sums round differently, or None."""
    old, new = before.get("environment", {}), now.get("environment", {})
    changed = [
        f"{key}: {_value_text(old, key)} -> {_value_text(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return f"the rest of this run will not be the same to the last bit: {'; '.join(changed)}" if changed else None


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise unless two identities are those of the same run.

    Raises:
        ConflictError: The run in the folder is another one; the message shows the difference.
    """
    if changed := differences(before, now):
        raise ConflictError(
            "this is not the run that was interrupted: " + "; ".join(changed),
            where=str(checkpoint),
            hint="resume with the old values; or start a new run from its weights: "
            f"training.warm_start={checkpoint} and another output_dir",
            recovered=str(checkpoint),
        )


def check_same_run(checkpoints: Checkpoints, snapshot: Snapshot | None, identity: Mapping[str, Any], part: str) -> None:
    """Compare one part of a run's identity with that of the checkpoint it resumes from.

    Args:
        checkpoints: Checkpoints of the run.
        snapshot: The checkpoint, or None for a new run, which is compared with nothing.
        identity: Identity of the run.
        part: The key in it.

    Raises:
        ConflictError: The checkpoint is of another run.
        IntegrityError: Its state is damaged.
    """
    if snapshot is None:
        return
    folder = checkpoints.path(snapshot.step)
    with understood(folder / STATE):
        known, position = snapshot.state["run"].get(part), snapshot.state["log_position"]
        if type(position) is not int or position < 0:
            raise TypeError("`log_position` is no number of bytes")
        if type(count := snapshot.state["processes"]) is not int or count < 1:
            raise TypeError("`processes` is no number of them")
    refuse_changes({part: known}, {part: identity[part]}, folder)


def check_same_settings(settings: RunConfig, folder: RunDir) -> None:
    """Compare the settings with those that a finished run was made with.

    Args:
        settings: Settings of the run.
        folder: The run folder.

    Raises:
        ConflictError: They differ in something that changes what is trained.
    """
    written = folder.path / CONFIG
    if written.is_file():
        before = RunConfig.load(written).model_dump(mode="json")
        refuse_changes({"config": before}, {"config": settings.model_dump(mode="json")}, folder.adapter)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a tree's values by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value_text(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "(missing)"
    return text if len(text) <= 60 else text[:57] + "..."
