"""Settings under `data.augment:` in a run file: a list of augmenters, each a name or a mapping with `name`.

Settings only, without the code that makes rows: a run file can be checked without torch and without reading rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from graftwerk.errors import ConfigError
from graftwerk.settings import Settings
from graftwerk.settings_parsing import parse_choice

Probability = Annotated[float, Field(gt=0, lt=1)]
Times = Annotated[float, Field(gt=0, le=100)]


class Augmenter(Settings):
    """The root. Every augmenter makes new rows out of training rows, and never changes those."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    weight: Times = Field(
        default=1.0, description="how often each made row is trained on for every time that a real one is; 0.5: half"
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings with `name`, as they stand in a run file."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def making(self) -> dict[str, Any]:
        """Return the settings that determine the rows made: all but `weight`, which says how often they are used."""
        made = self.to_dict()
        made.pop("weight")
        return made


class Making(Augmenter):
    """Abstract: makes rows itself, from a seed."""

    n: int = Field(default=1, ge=1, le=100, description="variants made of a row")
    seed: int = Field(default=0, ge=0, description="of all that is drawn; a row's share depends on its own text alone")


class Noise(Making):
    """Abstract: moves, removes or adds words of one part of a row. Words are what white space separates."""

    part: str | None = Field(
        default=None, description="which part of a row is changed; none: the text or source that a model reads"
    )


class WordDropout(Noise):
    """Each word is left out with a probability; at least one stays."""

    name = "word_dropout"
    title = "Word dropout"
    paper = "Iyyer et al. 2015; Lample et al. 2018"
    probability: Probability = Field(default=0.1, description="with which a word is left out")


class WordShuffle(Noise):
    """Words change places, and none moves by more than `distance`."""

    name = "word_shuffle"
    title = "Bounded word shuffle"
    paper = "Lample et al. 2018"
    distance: int = Field(default=3, ge=1, description="places that a word moves at most")


class WordInsertion(Noise):
    """Words of the row set's own vocabulary, as frequent as they are in it, are put between those of a row."""

    name = "word_insertion"
    title = "Random word insertion"
    paper = "Xie et al. 2017; Wei and Zou 2019"
    probability: Probability = Field(default=0.1, description="with which a word is put in behind each word")


class Translator(Settings):
    """A model that writes one text for another."""

    model: str = Field(description="run folder, adapter folder, or a model: hub id, folder, .gguf file, pkg://...")
    base: str | None = Field(default=None, description="base of an adapter that is not where the adapter says")
    task: str | dict[str, Any] | None = Field(
        default=None, description="how the model is asked, as a run file's `task`; none: as the adapter was trained"
    )


class Generation(Making, Translator):
    """Abstract: one side of a row is written by a model from the other."""

    reads: str | None = Field(default=None, description="the part that the model is given")
    writes: str | None = Field(default=None, description="the part that its answer becomes")
    through: Translator | None = Field(
        default=None, description="a model that the text passes first, for a round trip through another language"
    )
    num_beams: int = Field(default=1, ge=1, description="beams of the search, of which the best n are taken; 1: sample")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of sampling; none: 1; 0: always the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="sample among the likeliest tokens that have so much probability; none: all"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="longest answer; none: twice the tokens that the model was given, and 16"
    )
    max_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens that the model is given at most; none: what it was made for"
    )
    batch_size: int = Field(default=16, ge=1, description="texts that are worked on together")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.num_beams > 1:
            for name in ("temperature", "top_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` is for sampling, which beam search (num_beams > 1) does not do")
            if self.n > self.num_beams:
                raise ValueError(f"{self.num_beams} beams cannot give n = {self.n} answers")
        elif self.temperature == 0:
            if self.n > 1:
                raise ValueError("at temperature 0 all answers to a text are the same, so n must be 1")
            if self.top_p is not None:
                raise ValueError("`top_p` does nothing at temperature 0")
        return self

    @property
    def legs(self) -> tuple[Translator, ...]:
        """Return the models that a text passes through, in order."""
        last = Translator(model=self.model, base=self.base, task=self.task)
        return (last,) if self.through is None else (self.through, last)


class BackTranslation(Generation):
    """A model of the other direction writes a synthetic source for a real target; a tag in front says so."""

    name: ClassVar[str] = "back_translation"
    title: ClassVar[str] = "Back-translation"
    paper: ClassVar[str] = "Sennrich et al. 2016; Edunov et al. 2018; tagged: Caswell et al. 2019"
    tag: str | None = Field(default=None, min_length=1, description="put in front of a synthetic source, as <BT>")


class ForwardTranslation(Generation):
    """A model of the same direction writes a synthetic target for a real source."""

    name: ClassVar[str] = "forward_translation"
    title: ClassVar[str] = "Forward translation"
    paper: ClassVar[str] = "Zhang and Zong 2016; Kim and Rush 2016"


class FromFile(Augmenter):
    """Rows that `graftwerk augment`, or anybody else, made before."""

    name = "file"
    title = "Rows from a file"
    paper = ""
    path: str = Field(description="a file with the columns of the training rows, as `graftwerk augment` writes it")


AUGMENTERS: dict[str, type[Augmenter]] = {
    augmenter.name: augmenter
    for augmenter in (WordDropout, WordShuffle, WordInsertion, BackTranslation, ForwardTranslation, FromFile)
}
"""Name -> augmenter: the only list of augmenters there is."""


def parse_augmenter(value: Any) -> Augmenter:
    """Parse an augmenter: `word_dropout` (or `word-dropout`), ``{name: word_dropout, probability: 0.2}``, or an object.

    Raises:
        ConfigError: there is no such augmenter or setting; the nearest is named.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and "name" in value:
        value = {**value, "name": str(value["name"]).replace("-", "_")}
    return parse_choice(value, Augmenter, AUGMENTERS, what="an augmenter", where="data.augment")


def parse_augmenters(value: Any) -> tuple[Augmenter, ...]:
    """Parse one augmenter, several, or none (``None`` or an empty list).

    Raises:
        ConfigError: as `parse_augmenter`; or one is given twice, which would only make the same rows twice.
    """
    if value is None:
        return ()
    listed: Iterable[Any] = [value] if isinstance(value, str | Mapping | Augmenter) else value
    if not isinstance(listed, list | tuple):
        raise ConfigError(f"`data.augment` is a list of augmenters, not {value!r:.80}", where="data.augment")
    found: list[Augmenter] = []
    for augmenter in map(parse_augmenter, listed):
        if any(augmenter.making() == other.making() for other in found):
            raise ConfigError(
                f"`{augmenter.name}` is given twice with the same settings, which would make the same rows twice",
                where="data.augment",
                hint="raise its `n` or its `weight`, or give the second another `seed`",
            )
        found.append(augmenter)
    return tuple(found)
