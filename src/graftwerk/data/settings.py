"""Settings under `data:` in a run file."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from graftwerk.augmentation.settings import Augmenter, parse_augmenters
from graftwerk.settings import Name, Settings

Share = Annotated[float, Field(gt=0, lt=1)]
Rows = Annotated[int, Field(ge=1)]
Format = Literal["instruction", "chat", "prompt-completion", "text"]


class Pair(Settings):
    """Two files of text whose lines belong together."""

    source: str = Field(description="file with a sentence a line")
    target: str = Field(description="file with the sentence that belongs to it, in the same line")


Source = str | list[str] | Pair
"""One place, several (all rows of all of them, in this order), or two files line by line."""
Filter = dict[Name, str | int | float | bool | list[str | int | float | bool]]


class SetSettings(Settings):
    """One of several data sets that are learnt together: where its rows are, and how often they are drawn."""

    name: str | None = Field(default=None, min_length=1, description="its name in reports; none: after its file")
    source: str | list[str] = Field(description="source of the rows; with `target`, the first of two aligned files")
    target: str | None = Field(default=None, description="second of two files whose lines belong together")
    task: str | dict[str, Any] | None = Field(default=None, description="this set's task; none: that of the run")
    weight: float = Field(default=1.0, gt=0, description="how often its rows are drawn, against those of other sets")
    max_rows: Rows | None = Field(default=None, description="use at most so many of its rows to train on")
    columns: dict[str, Name] | None = Field(default=None, description="as `data.columns`, which it replaces")
    filter: Filter | None = Field(default=None, description="as `data.filter`, which it replaces")
    prefix: str | None = Field(default=None, description="`prefix` of its task")
    source_lang: str | None = Field(default=None, description="`source_lang` of its task")
    target_lang: str | None = Field(default=None, description="`target_lang` of its task")
    validation: Rows | Share | Source | None = Field(
        default=None, description="as `data.validation`, which it replaces; none: a number or share of that is taken"
    )
    test: Rows | Share | Source | None = Field(default=None, description="as `data.test`, likewise")

    @property
    def rows_from(self) -> Source:
        """Raises ValueError where `target` stands beside several sources."""
        if self.target is None:
            return self.source
        if not isinstance(self.source, str):
            raise ValueError("`target` needs one `source`")
        return Pair(source=self.source, target=self.target)


def source_name(source: Source) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, str):
        return source
    if isinstance(source, Pair):
        return f"{source.source} and {source.target}"
    return ", ".join(source[:3]) + (f", and {len(source) - 3} more" if len(source) > 3 else "")


def plain(source: Any) -> Any:
    """Return a source as a JSON value."""
    return source.model_dump() if isinstance(source, Settings) else source


class DataSettings(Settings):
    """Sources of rows, and which rows are used.

    A source is a file (csv, tsv, jsonl, json, parquet, txt, also compressed), a folder of files of one kind, a pattern
    (``texts/*.jsonl``), a file inside an installed package (``pkg://package/path/inside.csv``), or a data set of the
    hub: ``owner/name[/configuration][:split]``, with or without ``hub://`` in front; a list of these; or two files
    whose lines belong together: ``{source: a.de, target: a.en}``.
    """

    train: str | list[str] | Pair | Annotated[list[SetSettings], Field(min_length=1)] = Field(
        description="source of the training rows; or a list of sets, each with `source` and settings of its own"
    )
    temperature: Annotated[float, Field(ge=1)] | Literal["infinity"] | None = Field(
        default=None,
        description="for several sets: rows drawn in proportion to the sets' sizes (1, as without), or more evenly,"
        " up to all sets alike (infinity)",
    )
    text_rows: Literal["line", "document"] = Field(
        default="line", description="in a .txt file a row is a line, or what stands between blank lines"
    )
    delimiter: str | None = Field(
        default=None,
        description="the character between the fields of csv and tsv files, `tab` for a tab; none: recognised"
        " (commas, semicolons, tabs, vertical bars)",
    )
    encoding: str | None = Field(
        default=None, description="of files of text; none: UTF-8, or Windows-1252 (Latin-1) where that is recognised"
    )
    columns: dict[str, Name] = Field(
        default_factory=dict,
        description="which column plays which part: {text: review, label: stars}; a part not named is its own column",
    )
    format: Format | None = Field(
        default=None, description="format of the rows of tasks with instructions; none: recognized by the columns"
    )
    filter: Filter = Field(
        default_factory=dict, description="keep rows whose column has this value, or one of these values"
    )
    validation: Rows | Share | Source | None = Field(
        default=0.1, description="rows held out for choosing the checkpoint: a number of rows, a share, or a source"
    )
    test: Rows | Share | Source | None = Field(
        default=None, description="rows held out for the metrics alone: a number of rows, a share, or a source"
    )
    max_train_rows: Rows | None = Field(
        default=None, description="use at most so many training rows, drawn by `split_seed`"
    )
    split_seed: int = Field(default=0, description="seed of the shuffle that splits; the same for every training seed")
    train_seed: int | None = Field(
        default=None,
        description="seed of another draw of training and validation rows, with the same test rows; none: `split_seed`",
    )
    max_length: Rows | None = Field(
        default=None, description="tokens kept of a row; none: what the model was trained for, at most 512"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="a row that cannot be read: stop with its file and line, or skip and count it"
    )
    max_truncated: float = Field(
        default=0.2, ge=0, le=1, description="refuse when more than this share of the rows would lose tokens"
    )
    allow: tuple[str, ...] = Field(
        default=(), description="severe findings, by their codes, that do not stop a run; `all`: none does"
    )
    split: str = Field(default="train", description="for a hub id in `train` that names no split: which to read")
    streaming: bool = Field(
        default=False,
        description="read training rows while training, for files larger than the memory; `max_train_rows` are then"
        " the first ones, and rows held out need sources of their own",
    )
    buffer_rows: Rows = Field(
        default=10_000, description="with `streaming`: rows in memory, shuffled and grouped by length among themselves"
    )
    augment: tuple[Augmenter, ...] = Field(
        default=(), description="augmenters that make further training rows: names, or settings with `name`"
    )

    @field_validator("columns", "filter", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """`data.filter=null` takes a run file's filter away."""
        return {} if value is None else value

    @field_validator("delimiter", mode="before")
    @classmethod
    def _delimiter(cls, value: Any) -> Any:
        """Take names and escapes, since a shell makes it hard to type a tab."""
        if value is None or not isinstance(value, str):
            return value
        character = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}.get(value.lower(), value)
        if len(character) != 1 or character.isalnum() or character in "\"'\r\n\0":
            raise ValueError(f"{value!r} is no character that separates fields; for instance ';' or 'tab'")
        return character

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            codec = codecs.lookup(value)
        except (LookupError, ValueError):
            raise ValueError(f"there is no encoding {value!r}; for instance utf-8, cp1252, utf-16") from None
        if not codec._is_text_encoding:  # base64, zip, ...
            raise ValueError(f"{value!r} is no encoding of text; for instance utf-8, cp1252, utf-16")
        return value

    @field_validator("augment", mode="before")
    @classmethod
    def _augment(cls, value: Any) -> tuple[Augmenter, ...]:
        return parse_augmenters(value)

    @field_validator("allow", mode="before")
    @classmethod
    def _allow(cls, value: Any) -> Any:
        """One code alone, as `all`, need not be a list."""
        return (value,) if isinstance(value, str) else value

    @field_serializer("augment")
    def _dump_augment(self, augment: tuple[Augmenter, ...]) -> list[dict[str, Any]]:
        return [augmenter.to_dict() for augmenter in augment]

    @field_validator("temperature", mode="before")
    @classmethod
    def _infinity(cls, value: Any) -> Any:
        """`.inf` is YAML's word for it, which JSON has not."""
        return "infinity" if value == float("inf") else value

    @model_validator(mode="after")
    def _sets_only(self) -> Self:
        if self.temperature is not None and not self.sets:
            raise ValueError("`temperature` does nothing for one data set: give `train` a list of sets")
        for each in self.sets:
            _ = each.rows_from
        return self

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if not self.streaming:
            if self.buffer_rows != DataSettings.model_fields["buffer_rows"].default:
                raise ValueError("`buffer_rows` does nothing without `streaming: true`")
            return self
        for split, wanted in (("validation", self.validation), ("test", self.test)):
            if isinstance(wanted, int | float):
                raise ValueError(
                    f"with `streaming`, rows cannot be drawn from the training rows to be held out: give `{split}` a"
                    f" source of its own, or null, in place of {wanted}"
                )
        if self.sets:
            raise ValueError("`streaming` reads one data set, and `train` lists several sets")
        if self.train_seed is not None:
            raise ValueError("`train_seed` draws rows, and `streaming` trains on all of them in their order")
        if self.augment:
            raise ValueError("`augment` reads rows that are in memory: write its rows with `graftwerk augment`")
        return self

    @property
    def sets(self) -> tuple[SetSettings, ...]:
        """Return the sets of `train`, empty if it is a single source."""
        listed = self.train if isinstance(self.train, list) else []
        return tuple(each for each in listed if isinstance(each, SetSettings))

    @property
    def source(self) -> Source:
        """Return `train` as one source.

        Raises:
            ValueError: it is several sets.
        """
        if isinstance(self.train, str | Pair):
            return self.train
        if self.sets:
            raise ValueError("`train` is several sets")
        return [each for each in self.train if isinstance(each, str)]
