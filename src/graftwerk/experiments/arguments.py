"""Arguments of a comparison, checked: metric and cost, the run file, settings in place of those in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.config import RunConfig, parse_overrides
from graftwerk.errors import ConfigError
from graftwerk.experiments.pareto import COSTS

VARY = ("training", "split")
"""Choices of what a seed varies: initialisation, order and dropout; and the draw of training rows besides."""


def check_vary(vary: str) -> str:
    """Return a choice of `VARY`.

    Raises:
        ConfigError: It is something else.
    """
    if vary not in VARY:
        raise ConfigError(f"`{vary}` cannot be varied", where="vary", hint=f"there are: {', '.join(VARY)}")
    return vary


def check_choices(base: RunConfig, metric: str | None, prefer: str | None, margin: float | None = None) -> None:
    """Raise ConfigError for an unknown metric or cost, or a margin that is none.

    Args:
        base: Settings of the comparison, whose task has the metrics.
        metric: Name of a metric, or None for the task's default.
        prefer: Name of a cost, or None for the default.
        margin: Distance within which methods are practically equal, or None for the default.

    Raises:
        ConfigError: The metric or cost does not exist; the message lists those that do. Or the margin is negative.
    """
    known = base.task.metrics
    if metric is not None and metric not in known:
        raise ConfigError(
            f"there is no metric `{metric}` for {base.task.name}",
            where="metric",
            hint=f"there are: {', '.join(known)}",
        )
    if margin is not None and not margin >= 0:
        raise ConfigError(
            f"a margin is a distance from 0 on, not {margin}", where="margin", hint="margin=0.01: a point"
        )
    if prefer is not None and prefer not in COSTS:
        raise ConfigError(f"there is no cost `{prefer}`", where="prefer", hint=f"there are: {', '.join(COSTS)}")


def refuse_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that would hold for every method, or for every seed.

    Raises:
        ConfigError: There is one.
    """
    for key in parse_overrides(dict(overrides)):
        if key.split(".")[0] == "method":
            raise ConfigError(
                f"`{key}` would hold for every method",
                where=key,
                hint="give settings with the method: methods=[{name: lora, r: 16}, ...]",
            )
        if key.split(".")[-1] == "seed":
            raise ConfigError(f"`{key}`: a comparison has several seeds", where=key, hint="seeds=0,1,2")
