"""Settings under `evaluation:` in a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graftwerk.settings import Settings


class EvaluationSettings(Settings):
    """Intervals, cost measurements, and how answers are generated."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="level of every interval")
    resamples: int = Field(default=1000, ge=100, description="bootstrap draws behind every interval")
    latency_batches: int = Field(default=10, ge=1, description="timed forward passes behind the latency")
    generate: bool = Field(
        default=True, description="let the model write answers and measure them, if the task has any"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="longest answer in tokens; none: half as much again as the longest reference"
    )
    num_beams: int = Field(default=1, ge=1, description="beams of the search; 1: greedy")
    length_penalty: float = Field(default=1.0, description="of beam search: above 1 for longer answers")
    generation_batch_size: int = Field(default=16, ge=1, description="rows that are answered together")
    examples: int = Field(
        default=5,
        ge=0,
        description="answers that are shown: source, reference, the base's own answer and the adapter's",
    )
    baseline: bool = Field(
        default=False, description="measure the unadapted base on the same rows too, for a table of before and after"
    )
