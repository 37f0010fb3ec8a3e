"""Token classification: a tag for each word of a row, such as named entities or parts of speech.

A word that the tokenizer splits into pieces is labelled once: at its first piece, or at its last in decoders, which
have read the whole word only there. A row longer than the model is cut into windows that overlap; each word is trained
and answered once, in the window where it is furthest from an edge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr

from graftwerk.data.checks import label_names, listed
from graftwerk.data.fields import spans_part, text_part, words_part
from graftwerk.data.findings import Issue
from graftwerk.data.settings import DataSettings, source_name
from graftwerk.data.splits_reader import RowFormat, read_splits
from graftwerk.data.stream import read_stream
from graftwerk.errors import AdapterError, DataError, UnsupportedError
from graftwerk.tasks.base import Task
from graftwerk.tasks.collator import Collator, TextCollator
from graftwerk.tasks.example import IGNORED, Example, Row
from graftwerk.tasks.example_checks import INSIDE_WORD, WINDOWS
from graftwerk.tasks.spans import OUTSIDE, as_bio, is_bio, spans_of, tags_of_spans, words_of
from graftwerk.tasks.splits import Splits, splits_of, splits_of_stream
from graftwerk.tasks.tagging import TagDecoder, TagObjective
from graftwerk.tasks.windows import NOWHERE, Window, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class TokenClassification(Task):
    """A tag for each word."""

    name = "token-classification"
    title = "Token classification"
    fields = ("tokens", "tags")
    metrics = (
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "entity_f1_macro",
        "word_accuracy",
    )
    best_metric = "entity_f1"
    has_head = True

    scheme: Literal["auto", "bio", "plain"] = Field(
        default="auto",
        description="bio: tags are `B-PER`, `I-PER`, `O`, also BIOES and BILOU; plain: a tag is a kind itself; auto: "
        "inferred from the training rows",
    )
    overlap: int | None = Field(
        default=None, ge=0, description="tokens that windows of a long row share; none: a quarter of a window"
    )

    _last: bool = PrivateAttr(default=False)
    _labels: tuple[str, ...] = PrivateAttr(default=())

    def for_model(self, config: PreTrainedConfig) -> Self:
        from transformers import AutoModelForMaskedLM

        bound = self.model_copy()
        encoder = type(config) in AutoModelForMaskedLM._model_mapping or getattr(config, "is_encoder_decoder", False)
        bound._last = not encoder
        return bound

    def resolved(self, splits: Splits) -> Self:
        """Return the task with the scheme of the tags."""
        if self.scheme != "auto":
            return self
        bio = all(is_bio(name) for name in splits.labels or ())
        return self.model_copy(update={"scheme": "bio" if bio else "plain"})

    def with_labels(self, labels: Sequence[str]) -> Self:
        bound = self.model_copy()
        bound._labels = tuple(labels)
        return bound

    # -- rows ------------------------------------------------------------------------------------------------------

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        """Return the format of words with tags, or of texts with spans of characters."""
        if "text" in columns and not {"tokens", "tags"} <= set(columns) and "tokens" not in columns:
            return RowFormat(
                {"text": text_part, "spans": spans_part}, key=_key, answers=("spans",), shape=self._from_spans,
                ask=lambda row: self.example_from_text(row["text"]),
            )  # fmt: skip
        return RowFormat(
            {"tokens": words_part, "tags": words_part}, key=_key, answers=("tags",), shape=self._from_tags,
            ask=lambda row: row,
        )  # fmt: skip

    def _from_tags(self, row: dict[str, Any]) -> dict[str, Any]:
        if len(row["tokens"]) != len(row["tags"]):
            raise ValueError(f"has {len(row['tokens'])} tokens and {len(row['tags'])} tags")
        tags = row["tags"] if self.scheme == "plain" else [as_bio(tag) for tag in row["tags"]]
        if self.scheme == "bio" and (wrong := [tag for tag in tags if not is_bio(tag)]):
            raise ValueError(f"has the tag {wrong[0]!r:.60}, which is no BIO tag")
        return {"tokens": row["tokens"], "tags": tags}

    def _from_spans(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row["text"]
        words, tags = tags_of_spans(text, row["spans"])
        if self.scheme == "plain":
            tags = [tag if tag == OUTSIDE else tag[2:] for tag in tags]
        made = {**_words(text, words), "tags": tags}
        return made if words == words_of(text) else {**made, "inside": True}

    def example_from_text(self, text: str) -> Row:
        return _words(text, words_of(text))

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        source = source_name(data.source)
        if data.streaming:
            streamed = read_stream(data, self.row_format, self.fields)
            rows: dict[str, Any] = {
                "train": streamed.rows, **{split: part.rows for split, part in streamed.held.items()}
            }  # fmt: skip
            names, said = self._check(rows, labels, source)
            return splits_of_stream(data, streamed, self.fields, labels=names, findings=said)
        chosen, findings = read_splits(data, self.row_format)
        names, said = self._check({split: part.rows for split, part in chosen.items()}, labels, source)
        return splits_of(data, chosen, [*findings, *said], self.fields, labels=names)

    def _check(
        self, rows: Mapping[str, Any], labels: Sequence[str] | None, source: str
    ) -> tuple[tuple[str, ...], list[Issue]]:
        """Return the names of the tags, and the issues found with them."""
        counts = {split: Counter(tag for row in part for tag in row["tags"]) for split, part in rows.items()}
        used = {tag for count in counts.values() for tag in count}
        if labels is not None:
            if extra := sorted(used - {*labels, OUTSIDE}):
                raise AdapterError(
                    f"the rows have tags that the adapter was not trained for: {listed(extra)}",
                    where=f"adapter: {listed(list(labels))}",
                    hint="use rows with the adapter's tags, or train a new adapter",
                )
            return tuple(labels), []
        train = counts["train"]
        for split, count in counts.items():
            if extra := sorted(set(count) - set(train)):
                raise DataError(
                    f"the {split} rows have tags that no training row has: {listed(extra)}",
                    hint="give both the same tags (spelling and case count), or remove those rows",
                )
        if not set(train) - {OUTSIDE}:
            raise DataError(
                f"all {train.total():,} words of {source} have the tag `{OUTSIDE}`; there is nothing to find",
                hint="check `data.columns.tags` (or `spans`) and `data.filter`",
            )
        found = []
        tagged = [tag for tag in train if tag != OUTSIDE]
        mixed = [tag for tag in tagged if not is_bio(tag)]
        if mixed and self.scheme == "auto" and len(mixed) < len(tagged):
            raise DataError(
                f"some tags are BIO ({next(tag for tag in tagged if is_bio(tag))}) and some are not ({mixed[0]})",
                where="task.scheme",
                hint="correct them; or task.scheme=plain, which takes every tag as it is",
            )
        if rare := sorted(tag for tag, count in train.items() if count < FEW):
            message = f"{len(rare):,} of {len(train):,} tags stand on fewer than {FEW} training words"
            found.append(
                Issue("rare-tags", message, 0, example=listed(rare), hint="add rows with these, or join kinds")
            )
        return label_names([*train, OUTSIDE] if not mixed else list(train)), found

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Encode rows to one example each, or to several that overlap where a row is longer than ``max_length``.

        Raises:
            UnsupportedError: The tokenizer does not say which characters a token stands for.
            DataError: A tag that is not in ``splits.labels``.
            ConfigError: `max_length` leaves no room for text.
        """
        if not tokenizer.is_fast:
            raise UnsupportedError(
                "this tokenizer does not say which characters a token stands for, so words cannot be found in it",
                where="model",
                hint="use a model with a fast tokenizer (tokenizer.json)",
            )
        ids = {name: index for index, name in enumerate(splits.labels or ())}
        examples = []
        texts = [(_text(row), _places(row)) for row in rows]
        for at, windows in enumerate(windows_of(texts, tokenizer, max_length, self.overlap, last=self._last)):
            row = rows[at]
            notes = ((WINDOWS,) if len(windows) > 1 else ()) + ((INSIDE_WORD,) if row.get("inside") else ())
            for window in windows:
                place: Row = {"row": at, "at": window.at}
                target = None
                if "tags" in row:
                    place["gold"] = _gold(window, row["tags"], ids)
                    target = [IGNORED] * len(window.inputs["input_ids"])
                    for position, tag in zip(window.at, place["gold"], strict=True):
                        if position != NOWHERE:
                            target[position] = tag
                examples.append(Example(window.inputs, target, row=place, notes=notes))
        return examples

    def labels_in(self, row: Row) -> Sequence[str]:
        return tuple(row["tags"])

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """Return the answer with its entities, in words or, for a text, in characters; and with what was asked."""
        found = []
        places = _places(row) if "text" in row else None
        text = _text(row)
        for start, end, kind in spans_of(answer["tags"], plain=not all(map(is_bio, self._labels))):
            entity: dict[str, Any] = {
                "label": kind,
                "start": start,
                "end": end,
                "text": " ".join(row["tokens"][start:end]),
            }
            if places is not None:
                first, last = places[start][0], places[end - 1][1]
                entity.update(start=first, end=last, text=text[first:last])
            entity["score"] = min(answer["scores"][start:end])
            found.append(entity)
        return {"entities": found, **answer, **({"text": text} if "text" in row else {"tokens": list(row["tokens"])})}

    # -- model -----------------------------------------------------------------------------------------------------

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return splits.label_settings()

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def head_bias(self, examples: Sequence[Example], labels: Sequence[str]) -> list[float]:
        """Return the log of each tag's share of the training words: most words have none, and the head knows it."""
        counts = Counter(label for example in examples for label in example.target if label != IGNORED)
        total = counts.total() + len(labels)
        return [math.log((counts[index] + 1) / total) for index in range(len(labels))]

    @property
    def collator(self) -> Collator:
        return TextCollator()

    @property
    def objective(self) -> TagObjective:
        return TagObjective()

    @property
    def decoder(self) -> TagDecoder:
        return TagDecoder(self._labels)


FEW = 5
"""A tag on fewer training words is told."""


def _key(row: Mapping[str, Any]) -> str:
    return " ".join(row["tokens"])


def _words(text: str, words: Sequence[tuple[int, int]]) -> Row:
    return {"tokens": [text[start:end] for start, end in words], "text": text, "starts": [start for start, _ in words]}


def _text(row: Row) -> str:
    return str(row["text"]) if "text" in row else " ".join(row["tokens"])


def _places(row: Row) -> list[tuple[int, int]]:
    """Return where each word stands in the text of the row."""
    if "text" in row:
        return [(start, start + len(word)) for start, word in zip(row["starts"], row["tokens"], strict=True)]
    places, start = [], 0
    for word in row["tokens"]:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return places


def _gold(window: Window, tags: Sequence[str], ids: Mapping[str, int]) -> list[int]:
    """Return the ids of the tags of a window's words."""
    if unknown := [tags[word] for word in window.words if tags[word] not in ids]:
        raise DataError(f"a word has the tag {unknown[0]!r}, which is none of: {', '.join(ids)}")
    return [ids[tags[word]] for word in window.words]
