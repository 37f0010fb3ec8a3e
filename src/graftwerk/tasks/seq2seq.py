"""Base of summarization and translation: one text in, another out, with any model that generates text.

Encoder-decoder models read `prefix` and text, and learn exactly the labels that their own tokenizer makes of the answer
(``tokenizer(text_target=...)``). Causal models read a template filled with the text (as one user turn if the tokenizer
has a chat template), and learn the answer and the end token after it; a long text is truncated, never the template
around it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from graftwerk.data.fields import text_part
from graftwerk.data.splits_reader import RowFormat
from graftwerk.errors import ConfigError, DataError, UnsupportedError
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.example_checks import example_notes, special_notes, special_words
from graftwerk.tasks.generation import Generation
from graftwerk.tasks.prompt_format import WITHOUT, Fill, PromptFormat, check_frame
from graftwerk.tasks.splits import Splits
from graftwerk.tasks.text import TextTask
from graftwerk.tasks.tokenization import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T5_LIKE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"})
"""Model types that are told in words what to do."""


class Seq2SeqTask(TextTask):
    """Abstract. ``parts`` are the text that is read and the one that is written."""

    prefix: str | None
    template: str | None
    chat: bool = Field(
        default=True,
        description="causal models: the template is a user's turn, where the tokenizer has a chat template",
    )

    usual_prefix: ClassVar[str]
    """What models of the T5 family are told."""
    usual_template: ClassVar[str]

    def for_model(self, config: PreTrainedConfig) -> Self:
        """Return the task with the usual prefix or template of such a model if none is given.

        Raises:
            ConfigError: a setting that such a model makes no use of.
            UnsupportedError: a model that does not write.
        """
        bound = super().for_model(config)
        if bound.layout == "causal":
            _refuse_encoder(config, self.title)
            if self.prefix is not None:
                raise ConfigError(
                    f"`{config.model_type}` is a causal model, which reads a template and no prefix",
                    where="task.prefix",
                    hint=f"template: 'something {{{self.fields[0]}}} something'",
                )
            return bound._changed(template=self.template if self.template is not None else self.usual_template)
        if self.template is not None or not self.chat:
            raise ConfigError(
                f"`{config.model_type}` is an encoder-decoder model, which reads a prefix and no template",
                where="task.template" if self.template is not None else "task.chat",
                hint="prefix: 'something: '",
            )
        usual = self.usual_prefix if config.model_type in T5_LIKE else ""
        return bound._changed(prefix=self.prefix if self.prefix is not None else usual)

    def _changed(self, **settings: Any) -> Self:
        changed = self.model_copy(update=settings)
        changed._layout = self._layout
        return changed

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        read, written = self.fields[:2]
        return RowFormat({read: text_part, written: text_part}, key=read, answers=(written,))

    # -- encoding --------------------------------------------------------------------------------------------------

    @abstractmethod
    def words(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Return the values of the names in braces that prefix and template use, for one row."""

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits | None, max_length: int
    ) -> list[Example]:
        """Encode rows to token ids. A row without its second part gets the target None: no answer is known.

        ``max_length`` counts the tokens of a text that is read and of one that is written; for a causal model those of
        both together, template included.

        Raises:
            ConfigError: the template leaves no room for text.
            DataError: the model's chat template does not take a row.
            IntegrityError, ModelError, UnsupportedError: the chat template or tokenizer cannot be used.
        """
        if self.layout == "causal":
            return self._causal(rows, tokenizer, splits, max_length)
        return self.encode_pairs(rows, [""] * len(rows), tokenizer, max_length)

    def encode_pairs(
        self, rows: Sequence[Row], marks: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Example]:
        """Tokenize pairs for an encoder-decoder model, in the languages that the tokenizer is set to.

        Args:
            rows: The rows.
            marks: What stands before each prefix.
            tokenizer: The model's tokenizer.
            max_length: Tokens kept of a text.
        """
        read, written = self.fields[:2]
        texts = [
            mark + str(self.prefix).format(**self.words(row, tokenizer)) + row[read]
            for mark, row in zip(marks, rows, strict=True)
        ]
        sources = encode_texts(texts, tokenizer, max_length)
        answered = [place for place, row in enumerate(rows) if row.get(written) is not None]
        answers = encode_texts([rows[place][written] for place in answered], tokenizer, max_length, as_target=True)
        targets = {place: (inputs["input_ids"], cut) for place, (inputs, cut) in zip(answered, answers, strict=True)}
        special = special_words(tokenizer)
        examples = []
        for place, (row, (inputs, cut)) in enumerate(zip(rows, sources, strict=True)):
            ids = inputs["input_ids"]
            target, lost = targets.get(place, (None, 0))
            notes = special_notes([row[read], row.get(written) or ""], special)
            examples.append(Example({"input_ids": ids}, target, cut + lost, prompt=ids, row=row, notes=notes))
        return examples

    def _causal(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits | None, max_length: int
    ) -> list[Example]:
        read, written = self.fields[:2]
        asking = PromptFormat(tokenizer, chat=self.chat)
        fills = [self._fill(self.words(row, tokenizer)) for row in rows]
        frames = dict.fromkeys(dict.fromkeys(fill("") for fill in fills), 0)
        for empty, one in zip(frames, asking.encode(list(frames), [None] * len(frames)), strict=True):
            frames[empty] = len(one.prompt)
            check_frame(frames[empty], max_length)
        answers = [row.get(written) for row in rows]
        encoded = asking.encode([fill(row[read]) for fill, row in zip(fills, rows, strict=True)], answers)
        special = special_words(tokenizer)
        examples = []
        for at, (row, fill, answer, whole) in enumerate(zip(rows, fills, answers, encoded, strict=True)):
            one, lost = whole, 0
            if whole.unfit is None:
                one, lost = asking.shortened(whole, row[read], fill, answer, frames[fill("")], max_length)
            if one.unfit is not None:
                raise DataError(
                    f"the chat template of the model does not take a row: {one.unfit}",
                    where=(splits.locate(rows, at) if splits is not None else None) or f"{read}: {row[read][:80]!r}",
                    hint=f"{WITHOUT}; or leave such rows out",
                )
            notes = example_notes(one, [row[read], answer or ""], special)
            examples.append(Example({"input_ids": one.ids}, one.labels, lost, prompt=one.prompt, row=row, notes=notes))
        return examples

    def _fill(self, values: dict[str, str]) -> Fill:
        return lambda text: str(self.template).format(**{self.fields[0]: text}, **values)

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> TextDecoder:
        return PairDecoder(*self.fields[:2])

    @property
    def generation(self) -> Generation:
        return PairGeneration(self._layout, self.chat)


@dataclass(frozen=True)
class PairDecoder(TextDecoder):
    """Answers from one part of a row, compared with another.

    Attributes:
        read: The part that is answered.
        written: The part with the right answer.
    """

    read: str
    written: str

    def reference(self, example: Example) -> str | None:
        answer = (example.row or {}).get(self.written)
        return None if answer is None else str(answer)

    def source(self, example: Example) -> str | None:
        return str((example.row or {}).get(self.read, ""))


@dataclass(frozen=True)
class PairGeneration(Generation):
    """Generation that ends where a request's answer ends.

    Attributes:
        chat: True if causal models read requests as a user's turn, in their own chat template.
    """

    chat: bool

    def options(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        options = super().options(model, tokenizer, example)
        if self.layout == "causal":
            options["eos_token_id"] = PromptFormat(tokenizer, chat=self.chat).end_ids()
        return options


def _refuse_encoder(config: PreTrainedConfig, title: str) -> None:
    """Raise UnsupportedError for an encoder: with the head that transformers gives it, BERT would see the answer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        raise UnsupportedError(
            f"{title} needs a causal or encoder-decoder model, and `{config.model_type}` only reads",
            where="model",
            hint="a model like SmolLM2, GPT-2, T5, BART, mBART or Marian",
        )


def check_fields(text: str | None, allowed: Sequence[str], needed: str | None) -> str | None:
    """Return a prefix or template after a check of the names in its braces.

    Raises:
        ValueError: Another name stands in braces, or `needed` does not stand there exactly once.
    """
    if text is None:
        return None
    try:
        found = [(name, spec, turn) for _, name, spec, turn in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error}; a brace that is meant as one is written twice") from None
    names = [name for name, _, _ in found]
    for name, spec, turn in found:
        if name not in allowed or spec or turn:
            may = ", ".join(f"{{{one}}}" for one in allowed) or "nothing"
            raise ValueError(f"{{{name}}} is not known here; {may} may stand in braces")
    if needed is not None and names.count(needed) != 1:
        raise ValueError(f"{{{needed}}} must stand in it once")
    return text


def fields_in(text: str | None) -> set[str]:
    """Return the names that stand in braces in a text, or the empty set for None."""
    return {name for _, name, _, _ in Formatter().parse(text or "") if name is not None}
