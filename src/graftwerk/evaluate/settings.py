"""What a run file says under `evaluation:`."""

from __future__ import annotations

from pydantic import Field

from graftwerk.settings import Settings


class EvaluationSettings(Settings):
    """Intervals and cost measurements."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="level of every interval")
    resamples: int = Field(default=1000, ge=100, description="bootstrap draws behind every interval")
    latency_batches: int = Field(default=10, ge=1, description="timed forward passes behind the latency figure")
