"""What a run is, so that going on with it cannot silently become another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.config import anchored
from graftwerk.errors import ConflictError
from graftwerk.sanitize import redacted

FREE = (
    "config.output_dir",
    "config.data.allow",
    "config.evaluation.",
    "config.training.logging_steps",
    "config.training.report_to",
    "config.training.save_total_limit",
    "config.training.load_best",
    "config.training.processes",  # checked with the random states, which are of so many
    "environment.",
)
"""Settings that change nothing of what is trained, and may therefore be others when a run is gone on with."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each place where two identities differ in what matters, as ``key: old -> new``."""
    old, new = _flat(redacted(_from_anywhere(before))), _flat(redacted(_from_anywhere(now)))
    return [
        f"{key.removeprefix('config.')}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE) and (key not in old or key not in new or old[key] != new[key])
    ]


def _from_anywhere(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make the paths absolute: the same file is the same, and an older run may have stored relative ones."""
    config = identity.get("config")
    return {**identity, "config": anchored(config)} if isinstance(config, Mapping) else identity


def environment_warning(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What does not forbid going on, but makes sums round differently from here on."""
    old, new = before.get("environment", {}), now.get("environment", {})
    changed = [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return f"the rest of this run will not be the same to the last bit: {'; '.join(changed)}" if changed else None


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """
    Raises:
        ConflictError: the run in the folder is another one than what is asked for; the difference is shown.
    """
    if changed := differences(before, now):
        raise ConflictError(
            "this is not the run that was interrupted: " + "; ".join(changed),
            where=str(checkpoint),
            hint="go on with the old values; or begin a new run from its weights: "
            f"training.warm_start={checkpoint} and another output_dir",
            recovered=str(checkpoint),
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "(not there)"
    return text if len(text) <= 60 else text[:57] + "..."
