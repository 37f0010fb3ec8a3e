"""Settings of a search: how much is tried, how, and what the final comparison costs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graftwerk.settings import Settings


class SearchSettings(Settings):
    """Settings of a search, beside those of the run file and the axes."""

    trials: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="trials in all; none: 20, or as many as the seconds allow, or the whole grid"
    )
    seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="seconds of trials; none begins after them"
    )
    sampler: Literal["tpe", "random", "grid"] = Field(default="tpe", description="how the next settings are chosen")
    pruner: Literal["median", "wilcoxon", "none"] = Field(
        default="median",
        description="when a trial is given up: below the median of the others at the same epoch; if its validation "
        "rows are worse than the best trial's by Wilcoxon's test; never",
    )
    workers: int = Field(default=1, ge=1, le=64, description="trials at once, each in a process of its own")
    finalists: int = Field(default=3, ge=1, description="best trials that are trained again with fresh seeds")
    repeats: int = Field(default=3, ge=2, description="fresh seeds for each of them, and for the defaults")
    metric: str | None = Field(default=None, description="what decides; none: the task's own")

    @property
    def most(self) -> int | None:
        """Return the most trials, or None if seconds or a grid settle that."""
        if self.trials is None and self.seconds is None and self.sampler != "grid":
            return TRIALS
        return self.trials


TRIALS = 20
"""Trials of a search without a budget of its own."""
