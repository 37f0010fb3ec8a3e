"""Settings under `evaluation:` in a run file."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from graftwerk.settings import Amount, Name, Settings

SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop", "num_return_sequences")
"""Settings of answers that are sampled, cut or several."""
WRITTEN = ("generate", "max_new_tokens", "num_beams", "length_penalty", "generation_batch_size", *SAMPLING)
"""Settings that act on the answers a model writes, and on nothing else."""


GENERAL = "general"
"""Name of the sample of general text that comes with the package, as a value of `texts`."""


class RetainedSettings(Settings):
    """Something that a training must not make the model worse at."""

    run: str | None = Field(
        default=None, description="a finished run or an adapter folder: its held-out rows, answered with its own head"
    )
    data: str | None = Field(
        default=None, description="a file of labelled rows: for the task of `run`, or without it for this run's own"
    )
    texts: str | None = Field(
        default=None,
        description="a file of plain text whose perplexity is measured; general: a sample that comes with the package",
    )
    columns: dict[str, Name] = Field(default_factory=dict, description="column of `data` or `texts` for each field")
    max_rows: Annotated[int, Field(ge=1)] | None = Field(
        default=500, description="most rows that are measured, evenly spaced; null: all"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.texts is None) == (self.run is None and self.data is None):
            raise ValueError("give `run`, `data` (or both), or `texts`")
        if self.columns and self.data is None and self.texts in (None, GENERAL):
            raise ValueError("`columns` names columns of `data` or of a file of `texts`; leave it out")
        return self


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
    retained: dict[Name, RetainedSettings] = Field(
        default_factory=dict,
        description="what must not be forgotten, by name: measured before and after the training on the same rows; "
        "general: the perplexity of a sample of general text",
    )
    max_forgetting: Amount | None = Field(
        default=None,
        description="most that any of `retained` may lose, else the run ends with an error and is not handed over: "
        "`2 points` (hundredths of a share, points of BLEU or chrF, percent of a perplexity or an error) or `5 %` of "
        "the value before",
    )

    @field_validator("retained", mode="before")
    @classmethod
    def _general(cls, value: Any) -> Any:
        """The sample that comes with the package needs no more than its name."""
        if value is None:
            return {}
        listed = {GENERAL: GENERAL} if value == GENERAL else value
        if not isinstance(listed, dict):
            return value
        return {name: {"texts": GENERAL} if each == GENERAL else each for name, each in listed.items()}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        """One text alone need not be a list."""
        return (value,) if isinstance(value, str) else () if value is None else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_forgetting is not None and not self.retained:
            raise ValueError("`max_forgetting` is a bound on what `retained` names; give `retained: general`")
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
