"""Prediction for any number of rows: answered chunk by chunk, in order, in bounded memory.

The bounds of the chunks depend on nothing but the number of the row, so that a prediction that goes on in the middle
batches its rows as one that was never stopped, and gives the same answers to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwerk.data.fields import text_part
from graftwerk.data.row_source import TEXT, RowSource, SourceRow, open_source, source_of
from graftwerk.data.rows import Table
from graftwerk.data.splits_reader import RowFormat, named, unanswered_format
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.evaluate import answer_examples, shown_input, with_settings
from graftwerk.evaluation.loading import LoadedAdapter, load_adapter_for
from graftwerk.evaluation.row_errors import naming_source
from graftwerk.tasks.base import Example, Row

GROWTH = 16
"""The largest chunk, in batches; the first is one batch, and each is twice the one before."""
NOTES = 8
"""Notes on single chunks that are passed on; the rest are counted."""
StreamProgress = Callable[[int, int | None], None]
"""Told (rows done, rows in all or None if that is not known)."""


@dataclass(frozen=True)
class Answered:
    """One row with its answer.

    Attributes:
        row: The row as its source has it.
        answer: What `predict` says of it (``label`` and ``scores``, or ``output``), or None.
        shown: The text that was answered, by the name that `predict` gives it; empty without an answer.
        reason: Why there is no answer, or None.
    """

    row: SourceRow
    answer: dict[str, Any] | None
    shown: dict[str, Any]
    reason: str | None = None


class Answerer:
    """Answers chunks of rows of one source, and counts what has no answer or was cut.

    Args:
        opened: The loaded adapter.
        source: Where the rows are from.
        columns: Column of each field. Default: as in training; lines of text need none.
        batch_size: Rows per forward pass. Default: as in the run's own evaluation.

    Raises:
        ConfigError: The columns do not suit the task.
    """

    def __init__(
        self,
        opened: LoadedAdapter,
        source: RowSource,
        columns: Mapping[str, str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.opened, self.source = opened, source
        self.batch_size = batch_size or opened.eval_batch_size
        self.rows = self.truncated = 0
        self.reasons: Counter[str] = Counter()
        self._first_place: str | None = None
        self._said: dict[str, None] = {}
        self._format: tuple[RowFormat, dict[str, str]] | None = None
        if columns is not None or not source.lines:
            wanted = opened.columns if columns is None else dict(columns)
            table = Table(source.name, source.name, [], [], columns=source.columns)
            with naming_source(source.name):
                self._format = unanswered_format(table, opened.task.row_format, wanted)
                self._named(Table(source.name, source.name, [{}], [0], columns=source.columns))

    def _named(self, table: Table) -> Table:
        assert self._format is not None
        asked, columns = self._format
        return named(table, asked, columns, {})

    @property
    def unit(self) -> int:
        """Return the rows of the first chunk: those of one batch."""
        return self.opened.evaluation.generation_batch_size if self.opened.task.generates else self.batch_size

    def __call__(self, rows: Sequence[SourceRow], on_progress: Callable[[int], None] | None = None) -> list[Answered]:
        """Answer the rows of one chunk, in their order; called again with the next one."""
        reasons, usable = self._read(rows)
        examples, unfit = self._encode(rows, usable)
        reasons |= unfit
        asked = [at for at in usable if at not in unfit]
        answers = answer_examples(
            self.opened,
            examples,
            [usable[at] for at in asked],
            batch_size=self.batch_size,
            on_progress=None if on_progress is None else lambda done, _: on_progress(done),
            say=lambda text: self._said.setdefault(text),
        )
        found = dict(zip(asked, answers, strict=True)) if asked else {}
        one_each = len(examples) == len(asked)
        shown = {
            at: shown_input(self.opened.task, usable[at], examples[place]) if one_each else {}
            for place, at in enumerate(asked)
        }
        self.truncated += sum(example.truncated > 0 for example in examples)
        self.count(rows, [reasons.get(at) for at in range(len(rows))])
        return [Answered(row, found.get(at), shown.get(at, {}), reasons.get(at)) for at, row in enumerate(rows)]

    def count(self, rows: Sequence[SourceRow], reasons: Sequence[str | None]) -> None:
        """Count rows, and those of them without an answer; also for rows that were answered earlier."""
        self.rows += len(rows)
        for row, reason in zip(rows, reasons, strict=True):
            if reason is not None:
                self.reasons[reason] += 1
                self._first_place = self._first_place or row.place

    @property
    def unanswered(self) -> int:
        """Return how many rows have no answer so far."""
        return self.reasons.total()

    def notes(self) -> list[str]:
        """Return what is to be said about all rows so far."""
        said = [*self.source.notes, *list(self._said)[:NOTES]]
        if len(self._said) > NOTES:
            said.append(f"and {len(self._said) - NOTES:,} more notes of this kind")
        if self.truncated:
            said.append(f"{self.truncated:,} of {self.rows:,} rows were cut to {self.opened.max_length} tokens")
        if self.reasons:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common(5))
            more = f"; and {len(self.reasons) - 5:,} more reasons" if len(self.reasons) > 5 else ""
            first = f"the first is {self._first_place}"
            said.append(f"{self.unanswered:,} of {self.rows:,} rows have no answer: {why}{more}; {first}")
        return said

    def _read(self, rows: Sequence[SourceRow]) -> tuple[dict[int, str], dict[int, Row]]:
        """Return why rows cannot be used, and the others as the task understands them, both by place in the chunk."""
        reasons = {at: row.fault for at, row in enumerate(rows) if row.fault is not None}
        good = [at for at in range(len(rows)) if at not in reasons]
        if self._format is None:
            usable: dict[int, Row] = {}
            for at in good:
                try:
                    usable[at] = self.opened.task.example_from_text(text_part(rows[at].cells.get(TEXT)))
                except ValueError as error:
                    reasons[at] = f"the text {error}"
            return reasons, usable
        table = Table(self.source.name, "", [rows[at].cells for at in good], good, columns=self.source.columns)
        read = self._named(table)
        reasons |= {bad.line: bad.reason for bad in read.bad}
        return reasons, dict(zip(read.lines, read.rows, strict=True))

    def _encode(self, rows: Sequence[SourceRow], usable: Mapping[int, Row]) -> tuple[list[Example], dict[int, str]]:
        """Encode rows; where one of them does not fit the model's template, one by one, to know which."""
        try:
            return self.opened.encode(list(usable.values())), {}
        except DataError:
            unfit: dict[int, str] = {}
            for at, row in usable.items():
                try:
                    self.opened.encode([row])
                except DataError as error:
                    unfit[at] = error.what
            return self.opened.encode([row for at, row in usable.items() if at not in unfit]), unfit


def chunks_of(source: Iterable[SourceRow | None], unit: int, *, eager: bool = False) -> Iterator[list[SourceRow]]:
    """Yield the rows of a source in chunks: one batch, then twice as much each time up to `GROWTH` batches.

    Args:
        source: Rows, and None when a reader should not wait for the next one.
        unit: Rows of the first chunk.
        eager: Hand on what there is instead of waiting.
    """
    size = unit
    held: list[SourceRow] = []
    for row in source:
        if row is not None:
            held.append(row)
        if held and (len(held) == size or (row is None and eager)):
            yield held
            held = []
            size = min(2 * size, GROWTH * unit)
    if held:
        yield held


class PredictionStream(Iterator[dict[str, Any]]):
    """The answers to rows one after another, made as they are asked for (`predict_stream`).

    Attributes:
        answerer: Counts rows, those without an answer, and their reasons.
    """

    def __init__(self, answerer: Answerer, answered: Iterator[Answered]) -> None:
        self.answerer, self._answered = answerer, answered

    def __next__(self) -> dict[str, Any]:
        one = next(self._answered)
        return {**(one.answer or {}), **one.shown, "row": one.row.cells, "reason": one.reason}

    @property
    def notes(self) -> list[str]:
        """Return notes on all rows so far: those that were cut, and those without an answer."""
        return self.answerer.notes()


def predict_stream(
    target: Any,
    rows: Iterable[str | Mapping[str, Any]] | None = None,
    data: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    model: str | None = None,
    force: bool = False,
    batch_size: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    on_progress: StreamProgress | None = None,
) -> PredictionStream:
    """Predict for any number of rows, one after another and in order, in bounded memory.

    Args:
        target: As for `evaluate`.
        rows: Texts, or rows as mappings: a list, or anything that gives them one after another.
        data: In place of rows: a file, folder, pattern, `pkg://...` or hub id, or ``-`` for lines of standard input.
        columns: As for `evaluate`.
        model: As for `evaluate`.
        force: As for `evaluate`.
        batch_size: As for `evaluate`.
        evaluation: As for `evaluate`.
        on_progress: Called with (rows done, rows in all, or None if that is not known).

    Returns:
        An iterator of one mapping per row: the answer as `predict` gives it, ``row`` with all of the row's columns, and
        ``reason``: None, or why there is no answer (an empty cell, a broken line). Its ``notes`` say what was cut and
        how many rows have no answer.

    Raises:
        ConfigError: Neither rows nor data, or both; or columns that do not suit the task.
        DataError, AdapterError, ModelError, IntegrityError, ResourceError: As for reading data and loading models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> from graftwerk import LoRA, attach, predict_stream, save
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = save(attach(model, LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> answers = predict_stream(folder, (text for text in ["good", "", "bad"]))
        >>> [(sorted(answer.get("scores", {})), answer["reason"]) for answer in answers]
        [(['negative', 'positive'], None), ([], 'the text is empty'), (['negative', 'positive'], None)]
        >>> answers.notes
        ['1 of 3 rows have no answer: the text is empty (1); the first is row 2']
    """
    if (rows is None) == (data is None):
        raise ConfigError("give rows or data" + ("" if rows is None else ", not both"))
    source = open_source(data) if data is not None else source_of([rows] if isinstance(rows, str) else rows or ())
    opened = with_settings(load_adapter_for(target, model=model, force=force), evaluation)
    answerer = Answerer(opened, source, columns, batch_size)
    return PredictionStream(answerer, answers_of(answerer, on_progress, eager=True))


def answers_of(answerer: Answerer, on_progress: StreamProgress | None, *, eager: bool) -> Iterator[Answered]:
    """Yield the answer to every row of a source."""
    done, total = 0, answerer.source.total
    if on_progress is not None:
        on_progress(0, total)
    for rows in chunks_of(answerer.source, answerer.unit, eager=eager):
        yield from answerer(rows, shifted(on_progress, done, total))
        done += len(rows)
        if on_progress is not None:
            on_progress(done, total)


def shifted(on_progress: StreamProgress | None, done: int, total: int | None) -> Callable[[int], None] | None:
    """Return the progress of one chunk as part of that of all rows, of which ``done`` lie before it."""
    if on_progress is None:
        return None
    return lambda more: on_progress(done + more, total)
