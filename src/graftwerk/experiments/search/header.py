"""Header of a search, written before its first trial: command, machine, data, settings, space and notes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.experiments.axes import flow, text_of, written
from graftwerk.experiments.header import CONFIG, own_version
from graftwerk.experiments.search.settings import SearchSettings
from graftwerk.experiments.search.space import Axis, held_fixed


def search_header(
    base: RunConfig,
    axes: Sequence[Axis],
    wanted: SearchSettings,
    defaults: Mapping[str, Any],
    metric: str,
    checked: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the part of `search.json` that is known before training."""
    return {
        "graftwerk": own_version(),
        "command": command_of(base, axes, wanted),
        "model": base.model,
        "task": base.task.name,
        "method": base.method.to_dict(),
        "metric": metric,
        "confidence": base.evaluation.confidence,
        "space": [axis.to_dict() for axis in axes],
        "defaults": dict(defaults),
        "budget": wanted.model_dump(mode="json"),
        "machine": checked["machine"],
        "data": {name: checked[name] for name in ("origin", "fingerprint", "rows", "findings", "summary")},
        "training": base.training.model_dump(mode="json"),
        "notes": [finding["message"] for finding in checked["findings"] if finding.get("grave")],
    }


def command_of(base: RunConfig, axes: Sequence[Axis], wanted: SearchSettings) -> str:
    """Return the command that repeats or resumes the search."""
    words = ["graftwerk", "search", str(base.output_dir.absolute() / CONFIG)]
    words += [f"{key}={value}" for key, value in wanted.model_dump(mode="json", exclude_defaults=True).items()]
    for axis in axes:
        values = written(axis.choices) if axis.choices else f"{text_of(axis.low)}..{text_of(axis.high)}"
        words.append(f"{axis.key}={values}")
    # what is no axis would be searched again if it were not given
    words += [f"{key}={flow(value)}" for key, value in held_fixed(base, axes).items()]
    return shlex.join(words)
