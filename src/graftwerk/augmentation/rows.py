"""From rows to augmented rows: which part is changed, what is left out and counted, and where each row comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwerk.augmentation.filters import fault, normal
from graftwerk.augmentation.noise import Vocabulary, distort, same_words
from graftwerk.augmentation.progress_log import Journal
from graftwerk.augmentation.settings import BackTranslation, Generation, Noise, WordInsertion
from graftwerk.data.keyed_rng import fingerprint
from graftwerk.errors import ConfigError, DataError
from graftwerk.sanitize import redacted

Row = Mapping[str, Any]
ORIGIN = "origin"
USUAL_PARTS = ("text", "source", "document", "input", "prompt", "instruction")
"""What the part that a model reads is called, where no task says it."""


@dataclass
class Made:
    """Rows made by one augmenter.

    Attributes:
        rows: New rows, each with its `origin`, in the order of the rows they were made from.
        read: Rows that it was given.
        left_out: Variants that are not used, by `filters.REASONS`.
    """

    kind: str
    read: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        """Return ``{kind, read, made, left_out: {reason: variants}}``."""
        return {"kind": self.kind, "read": self.read, "made": len(self.rows), "left_out": dict(self.left_out)}


def make_noise(settings: Noise, rows: Sequence[Row], parts: Sequence[str]) -> Made:
    """Make `n` noisy variants of each row; leave out and count duplicates of the row and of earlier variants.

    Args:
        settings: Kind and strength of the noise, and ``n``, the number of variants per row.
        rows: The training rows.
        parts: Fields of the task, the one that the model reads first; empty if the field is found by its usual name.
    """
    part = changed_part(settings.part, rows, parts)
    texts = texts_of(rows, part)
    vocabulary = Vocabulary.of(texts) if isinstance(settings, WordInsertion) else None
    extra = {} if vocabulary is None else {"vocabulary": vocabulary.fingerprint}
    made = Made(settings.name, len(rows))
    for row, text in zip(rows, texts, strict=True):
        variants = _Variants(made, row, text, part, text)
        for number in range(settings.n):
            changed = distort(settings, text, number, vocabulary)
            if same_words(changed, text):
                made.left_out["unchanged"] += 1
            else:
                variants.add(changed, changed, {**_origin(settings, number), "part": part, **extra})
    return made


def make_translations(
    settings: Generation, rows: Sequence[Row], parts: Sequence[str], journal: Journal, key: str, on_progress: Any = None
) -> Made:
    """Make `n` translations of each row with a model; leave out and count those with a `filters.fault`.

    Raises:
        ConfigError: rows without the part that is to be read; a round trip with one model only.
    """
    from graftwerk.augmentation.translate import Answer, Question, ask, languages_of

    reads, writes = read_and_written(settings, rows, parts)
    texts = texts_of(rows, reads)
    tag = f"{settings.tag} " if isinstance(settings, BackTranslation) and settings.tag else ""
    turned = isinstance(settings, BackTranslation) and settings.through is None
    first = [
        Question(text, (None, None) if settings.through else languages_of(row, turned=turned))
        for row, text in zip(rows, texts, strict=True)
    ]
    models: list[dict[str, Any]] = []
    found, model = ask(settings, 0, first, settings.n, journal, f"{key}.0", on_progress)
    models.append(model)
    if settings.through is not None:  # of each of the n texts half way, one text at the end
        half = [Question(answer.text) for answers in found.values() for answer in answers if answer.text.strip()]
        ends, model = ask(settings, 1, half, 1, journal, f"{key}.1", on_progress)
        models.append(model)

        def whole(answer: Answer) -> Answer:
            if not answer.text.strip():
                return answer
            last = ends[Question(answer.text)][0]
            return Answer(last.text, answer.ended and last.ended, answer.whole and last.whole)

        found = {question: [whole(answer) for answer in answers] for question, answers in found.items()}
    said = {"reads": reads, "writes": writes, "model": models[-1], **({"through": models[0]} if models[1:] else {})}
    made = Made(settings.name, len(rows))
    for row, text, question in zip(rows, texts, first, strict=True):
        variants = _Variants(made, row, text, writes, row.get(writes))
        for number, answer in enumerate(found[question]):
            reason = fault(answer.text, text, ended=answer.ended) if answer.whole else "cut"
            if reason == "copied" and reads == writes:
                reason = "unchanged"
            if reason is not None:
                made.left_out[reason] += 1
            else:
                variants.add(tag + answer.text, answer.text, {**_origin(settings, number), **said})
    return made


class _Variants:
    """The variants of one row, each of which is to be another."""

    def __init__(self, made: Made, row: Row, read: str, writes: str, own: Any) -> None:
        self.made, self.row, self.writes = made, row, writes
        self.own = normal(own) if isinstance(own, str) else None
        self.digest = fingerprint(read)
        self.seen: set[str] = set()

    def add(self, text: str, compared: str, origin: dict[str, Any]) -> None:
        """Add a variant of the row, or count why it is left out.

        Args:
            text: The variant, as it is written to the new row.
            compared: The text without a tag.
            origin: Its ``origin``, with the ``kind`` of augmenter.
        """
        plain = " ".join(compared.split())
        if normal(compared) == self.own and origin["kind"] in ("back_translation", "forward_translation"):
            self.made.left_out["unchanged"] += 1
        elif plain in self.seen:
            self.made.left_out["repeated"] += 1
        else:
            self.seen.add(plain)
            self.made.rows.append({**self.row, self.writes: text, ORIGIN: {**origin, "row": self.digest}})


def _origin(settings: Noise | Generation, number: int) -> dict[str, Any]:
    made = redacted(settings.making())
    return {"kind": made.pop("name"), "seed": made.pop("seed"), "variant": number, "settings": made, "model": None}


def changed_part(named: str | None, rows: Sequence[Row], parts: Sequence[str]) -> str:
    """Return the name of the field that noise changes.

    Raises:
        ConfigError: The field is not given, and no field has a usual name.
    """
    if named is not None:
        return named
    columns = rows[0].keys() if rows else ()
    candidates = [*parts[:1], *USUAL_PARTS]
    found = next((part for part in candidates if part in columns), None)
    if found is None:
        raise ConfigError(
            f"which part of a row is to be changed? There are: {', '.join(columns) or 'none'}",
            where="part",
            hint="name it: part: text (on the command line part=text)",
        )
    return found


def read_and_written(settings: Generation, rows: Sequence[Row], parts: Sequence[str]) -> tuple[str, str]:
    """Return the names of the fields that a translation reads and writes.

    Raises:
        ConfigError: there are no such parts; or one text is to be written from itself by one model.
    """
    columns: Any = rows[0].keys() if rows else ()
    pair = ("target", "source") if isinstance(settings, BackTranslation) else ("source", "target")
    if settings.through is not None and settings.reads is None:
        text = settings.writes or changed_part(None, rows, parts)
        pair = (text, text)
    reads, writes = settings.reads or pair[0], settings.writes or pair[1]
    if reads not in columns:
        raise ConfigError(
            f"{settings.title.lower()} reads the part `{reads}`, and the rows have: {', '.join(columns) or 'none'}",
            where="reads",
            hint="name it (reads: ..., writes: ...); rows with one text alone need a model to go through and another "
            "to come back: through: {model: ..., task: ...}",
        )
    if reads == writes and settings.through is None:
        raise ConfigError(
            f"one model cannot write `{writes}` from itself",
            where="writes",
            hint="name another part, or a model to go through: through: {model: ..., task: ...}",
        )
    return reads, writes


def texts_of(rows: Sequence[Row], part: str) -> list[str]:
    """Return the texts of one field of the rows.

    Raises:
        DataError: A row has no such field, or it is empty or not text.
    """
    texts = []
    for place, row in enumerate(rows):
        text = row.get(part)
        if not isinstance(text, str) or not text.strip():
            what = "has no" if text is None else "has an empty" if isinstance(text, str) else "has no text as"
            raise DataError(
                f"row {place + 1} of {len(rows):,} {what} `{part}`",
                where=json.dumps(dict(row), ensure_ascii=False, default=str)[:200],
                hint="augment rows that have it, or name another part",
            )
        texts.append(text)
    return texts
