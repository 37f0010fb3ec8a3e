"""Settings under `evaluation:` in a run file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from graftwerk.settings import Settings

SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop", "num_return_sequences")
"""Settings of answers that are sampled, cut or several."""
WRITTEN = ("generate", "max_new_tokens", "num_beams", "length_penalty", "generation_batch_size", *SAMPLING)
"""Settings that act on the answers a model writes, and on nothing else."""


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
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="sample answers, with logits divided by it; none: the likeliest answer (also 0)"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="sample among the likeliest tokens that have so much probability; none: all"
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="sample among so many of the likeliest tokens; none: all"
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="of sampling: a row's answer follows from it and the row alone; none: 0"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="texts at which an answer ends, which are left out of it"
    )
    num_return_sequences: int = Field(
        default=1, ge=1, description="answers to a row, for `predict`: sampled, or the best of the beams"
    )
    generation_batch_size: int = Field(default=16, ge=1, description="rows that are answered together")
    examples: int = Field(
        default=5,
        ge=0,
        description="answers that are shown: source, reference, the base's own answer and the adapter's",
    )
    baseline: bool = Field(
        default=False, description="measure the unadapted base on the same rows too, for a table of before and after"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        """One text alone need not be a list."""
        return (value,) if isinstance(value, str) else () if value is None else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        named = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]
        if self.num_beams > 1:
            if self.sampled or self.temperature is not None or named:
                name = "temperature" if self.temperature is not None else named[0]
                raise ValueError(f"`{name}` is for sampling, which beam search (`num_beams` above 1) does not do")
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"{self.num_beams} beams cannot give {self.num_return_sequences} answers: more of `num_beams`"
                )
        elif not self.sampled:
            if named:
                why = "at `temperature: 0`" if self.temperature == 0 else "without sampling (`temperature: 1`)"
                raise ValueError(f"`{named[0]}` does nothing {why}")
            if self.num_return_sequences > 1:
                raise ValueError(
                    f"the likeliest answer is one, not {self.num_return_sequences}: give a `temperature` (sampling),"
                    " or `num_beams`"
                )
        return self

    @property
    def sampled(self) -> bool:
        """Return True if answers are sampled, False if they are searched for."""
        if self.temperature is not None:
            return self.temperature > 0
        return self.top_p is not None or self.top_k is not None
