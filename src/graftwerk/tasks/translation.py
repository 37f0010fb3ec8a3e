"""Translation of a text from one language to another.

The way to tell a model the languages depends on its family (`language_codes.py`): by codes in the tokens (mBART,
M2M100, NLLB, multilingual Marian), in words (T5's "translate German to English: ", a causal model's template), or not
at all (a Marian model of one pair).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator
from torch import Tensor

from graftwerk.data.fields import text_part
from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import RowFormat, fingerprint_of
from graftwerk.errors import ConfigError, DataError
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.generation import Generation
from graftwerk.tasks.language_codes import (
    LanguageCodes,
    check_code,
    codes_of,
    iso_code,
    language_context,
    language_name,
    name_or_error,
)
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.seq2seq import PairDecoder, PairGeneration, Seq2SeqTask, check_fields, fields_in
from graftwerk.tasks.splits import Splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIDES = ("source_lang", "target_lang")


class Translation(Seq2SeqTask):
    """Rows are pairs of texts; each may carry its own languages, else those of the settings count."""

    name = "translation"
    title = "Translation"
    fields = ("source", "target", *SIDES)
    metrics = ("bleu", "chrf", "exact_match", "perplexity", "length")
    usual_prefix = "translate {source_lang} to {target_lang}: "
    usual_template = "Translate the following text from {source_lang} to {target_lang}.\n\n{source}\n\nTranslation:\n"

    source_lang: str | None = Field(
        default=None, description="language of the sources of rows that do not say it: a code that the tokenizer knows"
    )
    target_lang: str | None = Field(default=None, description="language of the targets, likewise")
    both_directions: bool = Field(default=False, description="every pair is learnt and measured in both directions")
    prefix: str | None = Field(
        default=None,
        description="before the source, for encoder-decoder models; {source_lang} and {target_lang} become English "
        "names; none: 'translate {source_lang} to {target_lang}: ' for T5 and its like, else nothing",
    )
    template: str | None = Field(
        default=None,
        description="what a causal model reads, with {source} in it, and {source_lang}, {target_lang} if wanted; none: "
        "a plain request",
    )

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, value: str | None) -> str | None:
        return check_fields(value, SIDES, None)

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        return check_fields(value, ("source", *SIDES), "source")

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        usual = super().row_format(columns)
        return replace(usual, optional=dict.fromkeys(SIDES, text_part))

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        if data.streaming and self.both_directions:
            raise ConfigError(
                "rows that are streamed are not turned around",
                where="task.both_directions",
                hint="write both directions into the file, with the columns source_lang and target_lang",
            )
        splits = super().read(data, labels)
        if not self.both_directions:
            return splits
        rows = {split: self._both(getattr(splits, split)) for split in ("train", "validation", "test")}
        counted = {split: len(part) for split, part in rows.items()}
        return replace(
            splits,
            train=rows["train"],
            validation=rows["validation"],
            test=rows["test"],
            fingerprint=fingerprint_of(rows, self.fields, ["both directions"]),
            origin={**splits.origin, "rows": counted},
            where={split: _of_pair(where) for split, where in splits.where.items()},
        )

    def _both(self, rows: Sequence[Row]) -> list[Row]:
        """Return each row followed by the same row in the other direction."""
        both = []
        for row in rows:
            source, target = (self._code(row, side) for side in SIDES)
            languages = {"source_lang": source, "target_lang": target}
            if source is None or target is None:
                raise ConfigError(
                    "both directions need the languages of every pair",
                    where="task.source_lang, task.target_lang",
                    hint="name them, or give rows with the columns source_lang and target_lang",
                )
            there = {**row, **languages}
            both += [there, {**row, "source": row["target"], "target": row["source"],
                             "source_lang": target, "target_lang": source}]  # fmt: skip
        return both

    def resolved(self, splits: Splits) -> Self:
        """Return the task with the rows' languages if all have the same, which a bare text is later taken to have."""
        rows = splits.train[::2] if self.both_directions else splits.train
        pairs = {tuple(self._code(row, side) for side in SIDES) for row in rows}
        if len(pairs) != 1:
            return self
        source, target = pairs.pop()
        return self._changed(source_lang=source, target_lang=target)

    # -- encoding --------------------------------------------------------------------------------------------------

    def words(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Return the English names of the languages that prefix or template mention."""
        wanted = fields_in(self.template if self.layout == "causal" else self.prefix)
        return {
            side: name_or_error(
                self._language(row, side), setting=side, given=row.get(side) is None, where=_row_text(row)
            )
            for side in SIDES
            if side in wanted
        }

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits | None, max_length: int
    ) -> list[Example]:
        """Tokenize rows, each with the languages that the model needs.

        Raises:
            ConfigError, DataError: A language is missing or unknown to the tokenizer (the message lists those it
                knows), or the model cannot tell the two directions apart.
        """
        if self.layout == "causal":
            self._check_told(None)
            return super().encode(rows, tokenizer, splits, max_length)
        codes = codes_of(tokenizer)
        self._check_told(codes)
        if codes is None:
            self._check_pair(rows, tokenizer)
            own = getattr(tokenizer, "target_lang", None)  # Marian: the model of one pair says what it writes
            there = super().encode(rows, tokenizer, splits, max_length)
            return [_in_language(example, own) for example in there] if isinstance(own, str) else there
        pairs = [self._pair(row, codes) for row in rows]
        examples: dict[int, Example] = {}
        for pair in dict.fromkeys(pairs):
            places = [place for place, other in enumerate(pairs) if other == pair]
            chosen = [rows[place] for place in places]
            marks = [f">>{pair[1]}<< " if codes.place == "source" else ""] * len(chosen)
            with language_context(tokenizer, *pair) if codes.both else nullcontext():
                made = self.encode_pairs(chosen, marks, tokenizer, max_length)
            examples |= dict(zip(places, made, strict=True))
        return [examples[place] for place in range(len(rows))]

    def _pair(self, row: Row, codes: LanguageCodes) -> tuple[str, str]:
        sides = SIDES if codes.both else SIDES[1:]
        for side in sides:
            check_code(
                self._language(row, side), codes, setting=side, given=row.get(side) is None, where=_row_text(row)
            )
        return self._language(row, SIDES[0]) if codes.both else "", self._language(row, SIDES[1])

    def _language(self, row: Row, side: str) -> str:
        return _known(self._code(row, side), side)

    def _code(self, row: Row, side: str) -> str | None:
        return _code(row, side, getattr(self, side))

    def _check_told(self, codes: LanguageCodes | None) -> None:
        told = codes is not None or "target_lang" in fields_in(
            self.template if self.layout == "causal" else self.prefix
        )
        if self.both_directions and not told:
            raise ConfigError(
                "nothing would tell the model which direction is wanted: its tokenizer has no language codes",
                where="task.both_directions",
                hint="train two adapters; or put {target_lang} into task.template (causal models) or task.prefix",
            )

    def _check_pair(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        """A Marian model of one pair says which: rows of another would be learnt as if they were of this one."""
        for side in SIDES:
            own = getattr(tokenizer, side, None)
            name = language_name(own) if isinstance(own, str) else None
            for row in rows if name is not None else ():
                code = self._code(row, side)
                if code is not None and language_name(code) not in (None, name):
                    raise DataError(
                        f"the model's {side.partition('_')[0]} language is {name} alone, and a row has `{code}`",
                        where=_row_text(row),
                        hint="use the model of this pair, or other rows",
                    )

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> TextDecoder:
        return TranslationDecoder("source", "target", self.source_lang, self.target_lang, self.both_directions)

    @property
    def generation(self) -> Generation:
        return TranslationGeneration(self._layout, self.chat, self.target_lang)


@dataclass(frozen=True)
class TranslationDecoder(PairDecoder):
    """Translations, whose metrics need the language of the answers.

    Attributes:
        source_lang: Language of the sources of rows that name none, or None.
        target_lang: Language of their targets, or None.
        both_directions: True if every pair is learnt in both directions.
    """

    source_lang: str | None
    target_lang: str | None
    both_directions: bool

    def language(self, example: Example) -> str | None:
        code = _code(example.row, "target_lang", self.target_lang)
        return None if code is None else iso_code(code)

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> TextPredictions:
        """Return predictions as for other texts; with both directions, each direction is a set with its own metrics.

        Outputs are the negative log-likelihood and the number of tokens of each row, (1, 2).
        """
        found = super().predictions(outputs, examples, loss, texts)
        if not self.both_directions:
            return found
        usual = {"source_lang": self.source_lang, "target_lang": self.target_lang}
        pairs = [[_code(example.row, side, usual[side]) for side in SIDES] for example in examples]
        names = ["-".join(filter(None, pair)) for pair in pairs if None not in pair]
        return replace(found, sets=tuple(names)) if len(names) == len(pairs) else found


@dataclass(frozen=True)
class TranslationGeneration(PairGeneration):
    """Generation in the language that each row asks for.

    Attributes:
        target_lang: Language of the targets of rows that name none, or None.
    """

    target_lang: str | None

    def group(self, example: Example) -> str | None:
        """Return the language of the answer: rows of one batch are written in one."""
        return _code(example.row, "target_lang", self.target_lang)

    def options(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        options = super().options(model, tokenizer, example)
        codes = codes_of(tokenizer) if self.layout == "encoder-decoder" else None
        if codes is None or not codes.both:
            return options
        language = codes.ids[_known(self.group(example), "target_lang")]
        return {**options, ("forced_bos_token_id" if codes.place == "first" else "decoder_start_token_id"): language}


def _code(row: Row | None, side: str, usual: str | None) -> str | None:
    """Return a row's own language, or else the usual one."""
    code: str | None = (row or {}).get(side) or usual
    return code


def _known(code: str | None, side: str) -> str:
    """Return the language of a row, if there is one.

    Raises:
        ConfigError: Neither the row nor the settings name it.
    """
    if code is None:
        raise ConfigError(
            f"nothing says the {side.partition('_')[0]} language of a row",
            where=f"task.{side}, or the column {side}",
            hint="name it in the run file (task: {name: translation, source_lang: ..., target_lang: ...}), or "
            "give rows with such columns",
        )
    return code


def _of_pair(where: Callable[[int], str]) -> Callable[[int], str]:
    return lambda index: where(index // 2)


def _in_language(example: Example, target: str) -> Example:
    return replace(example, row={"target_lang": target, **(example.row or {})})


def _row_text(row: Row) -> str:
    return f"source: {str(row.get('source'))[:80]!r}"
