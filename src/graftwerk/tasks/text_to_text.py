"""What summarization and translation have in common: one text in, another out, with any model that writes.

Encoder-decoder models read `prefix` and text, and learn exactly the labels that their own tokenizer makes of the answer
(``tokenizer(text_target=...)``). Causal models read a template filled with the text (as one turn of a user, where the
tokenizer has a chat template), and learn the answer and the end token after it; a text that is too long is cut, never
the template around it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from string import Formatter
from typing import Any, ClassVar, Self

from graftwerk.data.parts import text_part
from graftwerk.data.reading import Reading
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.tasks.base import Example, Row, Splits
from graftwerk.tasks.encoding import encode_texts
from graftwerk.tasks.text import IGNORED, TextTask

ANSWER_SHARE = 4
"""Of the tokens of a causal model's row, one in so many is left for an answer that is not known yet."""

T5_LIKE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"})
"""Model types that are told in words what to do."""


class TextToText(TextTask):
    """Abstract. ``parts`` are the text that is read and the one that is written."""

    prefix: str | None
    template: str | None
    chat: bool

    usual_prefix: ClassVar[str]
    """What models of the T5 family are told."""
    usual_template: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    """What may stand in braces beside the text itself."""

    def on(self, architecture: Any) -> Self:
        """With the prefix or template that is usual for such a model, where none is given.

        Raises:
            ConfigError: a setting that such a model makes no use of.
            UnsupportedError: a model that does not write.
        """
        bound = super().on(architecture)
        if bound.layout == "causal":
            _refuse_encoder(architecture, self.title)
            if self.prefix is not None:
                raise ConfigError(
                    f"`{architecture.model_type}` is a causal model, which reads a template and no prefix",
                    where="task.prefix",
                    mend=f"template: 'something {{{self.parts[0]}}} something'",
                )
            return bound._changed(template=self.template if self.template is not None else self.usual_template)
        if self.template is not None:
            raise ConfigError(
                f"`{architecture.model_type}` is an encoder-decoder model, which reads a prefix and no template",
                where="task.template",
                mend="prefix: 'something: '",
            )
        usual = self.usual_prefix if architecture.model_type in T5_LIKE else ""
        return bound._changed(prefix=self.prefix if self.prefix is not None else usual)

    def _changed(self, **settings: Any) -> Self:
        changed = self.model_copy(update=settings)
        changed._layout = self._layout
        return changed

    def reading(self, columns: Sequence[str]) -> Reading:
        read, written = self.parts[:2]
        return Reading({read: text_part, written: text_part}, key=read, answers=(written,))

    # -- encoding --------------------------------------------------------------------------------------------------

    @abstractmethod
    def words(self, row: Row, tokenizer: Any) -> dict[str, str]:
        """What the `fields` of prefix and template are in this row; only those that occur in them have to be there."""

    def encode(self, rows: Sequence[Row], tokenizer: Any, splits: Splits | None, max_length: int) -> list[Example]:
        """A row without its second part gets the target None: an answer is asked for and none is known.

        Args:
            max_length: Tokens of a text that is read and of one that is written; for a causal model of both together,
                template included.

        Raises:
            ConfigError: the template leaves no room for text.
        """
        if self.layout == "causal":
            return [self._one_row(row, tokenizer, max_length) for row in rows]
        return self.encode_pairs(rows, [""] * len(rows), tokenizer, max_length)

    def encode_pairs(self, rows: Sequence[Row], marks: Sequence[str], tokenizer: Any, max_length: int) -> list[Example]:
        """For encoder-decoder models, in the languages that the tokenizer is set to.

        Args:
            marks: What stands before each prefix.
        """
        read, written = self.parts[:2]
        texts = [
            mark + str(self.prefix).format(**self.words(row, tokenizer)) + row[read]
            for mark, row in zip(marks, rows, strict=True)
        ]
        sources = encode_texts(texts, tokenizer, max_length)
        answered = [place for place, row in enumerate(rows) if row.get(written) is not None]
        answers = encode_texts([rows[place][written] for place in answered], tokenizer, max_length, as_target=True)
        targets = {place: (inputs["input_ids"], cut) for place, (inputs, cut) in zip(answered, answers, strict=True)}
        examples = []
        for place, (row, (inputs, cut)) in enumerate(zip(rows, sources, strict=True)):
            ids = inputs["input_ids"]
            target, lost = targets.get(place, (None, 0))
            examples.append(Example({"input_ids": ids}, target, cut + lost, prompt=ids, row=row))
        return examples

    def _one_row(self, row: Row, tokenizer: Any, max_length: int) -> Example:
        read, written = self.parts[:2]
        values = self.words(row, tokenizer)
        frame = len(self._prompt("", values, tokenizer))
        if frame + 2 > max_length:
            raise ConfigError(
                f"the template alone takes {frame} of {max_length} tokens",
                where="task.template",
                mend="a shorter template, or a longer data.max_length",
            )
        answer = None if row.get(written) is None else self._answer(row[written], tokenizer)
        prompt = self._prompt(row[read], values, tokenizer)
        wanted = len(prompt) + (len(answer) if answer is not None else max_length // ANSWER_SHARE)
        lost = 0
        if wanted > max_length:
            half = max((max_length - frame) // 2, 1)
            if answer is not None and len(answer) > half and len(answer) > max_length - len(prompt):
                kept = max(half, max_length - len(prompt))
                lost, answer = len(answer) - kept, answer[:kept]
            room = max_length - (len(answer) if answer is not None else min(max_length // ANSWER_SHARE, half))
            prompt, cut = self._shortened(row[read], values, tokenizer, prompt, room)
            lost += cut
        if answer is None:
            return Example({"input_ids": prompt}, None, lost, prompt=prompt, row=row)
        target = [IGNORED] * len(prompt) + answer
        return Example({"input_ids": prompt + answer}, target, lost, prompt=prompt, row=row)

    def _prompt(self, text: str, values: dict[str, str], tokenizer: Any) -> list[int]:
        """Ids of everything that stands before an answer."""
        asked = str(self.template).format(**{self.parts[0]: text}, **values)
        if self.chat and tokenizer.chat_template:
            turn = [{"role": "user", "content": asked}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
            return list(ids)
        ids = list(tokenizer(asked, verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # what ends here is not the answer

    def _answer(self, text: str, tokenizer: Any) -> list[int]:
        """Ids of an answer, the end token included."""
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return [*ids, tokenizer.eos_token_id]

    def _shortened(
        self, text: str, values: dict[str, str], tokenizer: Any, prompt: list[int], room: int
    ) -> tuple[list[int], int]:
        """The prompt with as much of the text's beginning as there is room for, and how many tokens were cut."""
        whole = len(prompt)
        ids = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
        keep = len(ids["input_ids"])
        while len(prompt) > room and keep > 0:
            keep = max(keep - (len(prompt) - room), 0)
            if not keep:
                text = ""
            elif tokenizer.is_fast:
                text = text[: ids["offset_mapping"][keep - 1][1]]
            else:
                text = tokenizer.decode(ids["input_ids"][:keep])
            prompt = self._prompt(text, values, tokenizer)
        return prompt, whole - len(prompt)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def reference(self, example: Example) -> str | None:
        answer = (example.row or {}).get(self.parts[1])
        return None if answer is None else str(answer)

    def source(self, example: Example) -> str | None:
        return str((example.row or {}).get(self.parts[0], ""))


def _refuse_encoder(architecture: Any, title: str) -> None:
    """transformers puts a language-model head on BERT too, which sees the answer while it is to write it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if architecture.model_type in ENCODERS and not getattr(architecture, "is_decoder", False):
        raise UnsupportedError(
            f"{title} needs a causal or encoder-decoder model, and `{architecture.model_type}` only reads",
            where="model",
            mend="a model like SmolLM2, GPT-2, T5, BART, mBART or Marian",
        )


def check_fields(text: str | None, allowed: Sequence[str], needed: str | None) -> str | None:
    """A prefix or template, if what stands in its braces is known.

    Raises:
        ValueError: something else in braces; or what is needed is not there, or twice.
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
    return {name for _, name, _, _ in Formatter().parse(text or "") if name is not None}
