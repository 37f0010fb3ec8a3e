"""What a run file says under `data:`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator

from graftwerk.augment.settings import Augmenter, parse_augmenters
from graftwerk.settings import Settings

Share = Annotated[float, Field(gt=0, lt=1)]
Rows = Annotated[int, Field(ge=1)]


class DataSettings(Settings):
    """Where rows come from and which of them are used.

    A source is a path (csv, tsv, jsonl, json, parquet), a file inside an installed package
    (``pkg://package/path/inside.csv``), or a data set of the hub: ``owner/name[/configuration][:split]``, with or
    without ``hub://`` in front.
    """

    train: str = Field(description="source of the training rows")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="which column plays which part: {text: review, label: stars}; a part not named is its own column",
    )
    filter: dict[str, str | int | float | bool | list[str | int | float | bool]] = Field(
        default_factory=dict, description="keep rows whose column has this value, or one of these values"
    )
    validation: Rows | Share | str | None = Field(
        default=0.1, description="rows held out for choosing the checkpoint: a number of rows, a share, or a source"
    )
    test: Rows | Share | str | None = Field(
        default=None, description="rows held out for the figures alone: a number of rows, a share, or a source"
    )
    max_train_rows: Rows | None = Field(
        default=None, description="use at most so many training rows, drawn by `split_seed`"
    )
    split_seed: int = Field(default=0, description="seed of the shuffle that splits; the same for every training seed")
    max_length: Rows | None = Field(
        default=None, description="tokens kept of a row; none: what the model was trained for, at most 512"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="a row that cannot be read: stop with its file and line, or skip and count it"
    )
    max_truncated: float = Field(
        default=0.2, ge=0, le=1, description="refuse when more than this share of the rows would lose tokens"
    )
    split: str = Field(default="train", description="for a hub id in `train` that names no split: which to read")
    augment: tuple[Augmenter, ...] = Field(
        default=(), description="augmenters that make further training rows: names, or settings with `name`"
    )

    @field_validator("augment", mode="before")
    @classmethod
    def _augment(cls, value: Any) -> tuple[Augmenter, ...]:
        return parse_augmenters(value)

    @field_serializer("augment")
    def _dump_augment(self, augment: tuple[Augmenter, ...]) -> list[dict[str, Any]]:
        return [augmenter.to_dict() for augmenter in augment]
