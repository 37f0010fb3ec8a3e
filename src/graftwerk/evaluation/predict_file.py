"""Prediction from a source into a file, which can be stopped anywhere and gone on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.data.row_source import SourceRow, open_source, source_of
from graftwerk.display import shown_rows
from graftwerk.errors import ConfigError, ConflictError, ErrorReport, ResourceError
from graftwerk.evaluation.answer_files import (
    AnswerFile,
    Columns,
    Written,
    as_cell,
    check_ending,
    open_answers,
    written_rows,
)
from graftwerk.evaluation.evaluate import with_settings
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.evaluation.stream import Answered, Answerer, StreamProgress, chunks_of, shifted
from graftwerk.sanitize import as_json

TOLERANCE = 1e-3
"""By how much a score may differ that is answered once more."""
SAME = 0.9
"""Share of the answers at the head of a file that must come out the same."""


def predict_file(
    target: Any,
    data: str | Path | Sequence[str],
    output: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    model: str | None = None,
    force: bool = False,
    batch_size: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: StreamProgress | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    r"""Predict for all rows of a source, and write each row with its answer to a file.

    Rows keep their order and all of their columns; beside them stand the parts of the answer (``label``, ``score_...``
    or ``output``) and ``reason``, why a row has no answer. A column of ours that a row has too is called
    ``predicted_...``.

    Args:
        target: As for `evaluate`.
        data: As for `predict_stream`; or a list of texts.
        output: A .csv, .tsv, .jsonl or .parquet file.
        columns: As for `evaluate`.
        model: As for `evaluate`.
        force: As for `evaluate`.
        batch_size: As for `evaluate`.
        evaluation: As for `evaluate`.
        resume: Go on where the file stops, after checking that it has these rows and answers of this adapter.
        overwrite: Replace an existing file.
        on_progress: As for `predict_stream`, in place of the progress display.
        quiet: Show no progress.

    Returns:
        ``output`` (the path), ``rows``, ``answered``, ``unanswered``, ``resumed_at`` (rows that were there already),
        ``columns`` of the file, and ``notes``.

    Raises:
        ConfigError: The file's ending is not known, or it does not belong to these rows and this adapter.
        ConflictError: The file exists.
        DataError, AdapterError, ModelError, IntegrityError, ResourceError: As for reading data and loading models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> from graftwerk import LoRA, attach, predict_file, save
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = save(attach(model, LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> _ = (base / "rows.csv").write_text("id,text\n1,good\n2,\n")
        >>> result = predict_file(folder, base / "rows.csv", base / "answers.csv")
        >>> result["answered"], result["unanswered"], result["columns"]
        (1, 1, ['id', 'text', 'label', 'score_negative', 'score_positive', 'reason'])
    """
    path = Path(output)
    check_ending(path)
    _check_free(path, data, resume=resume, overwrite=overwrite)
    source = open_source(data) if isinstance(data, str | Path) else source_of(data)
    opened = with_settings(load_adapter_for(target, model=model, force=force), evaluation)
    work = _Work(Answerer(opened, source, columns, batch_size), path)
    written = written_rows(path) if resume and path.exists() else None
    try:
        with shown_rows("predicting", on_progress, quiet) as work.on_progress:
            work.run(written)
    except ErrorReport as error:
        if work.in_file and error.recovered is None and not isinstance(error, ConfigError):
            _say_how_to_resume(error, work)
        raise
    finally:
        work.close()
    note = work.columns.note if work.columns is not None else None
    unanswered = work.answerer.unanswered
    return {
        "output": str(path),
        "rows": work.done,
        "answered": work.answerer.rows - unanswered,
        "unanswered": unanswered,
        "resumed_at": work.before,
        "columns": list(work.columns.names) if work.columns is not None else [],
        "notes": [*([note] if note else []), *work.answerer.notes()],
    }


def _check_free(path: Path, data: Any, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("resume continues the file, and overwrite starts it over", hint="give one of them")
    if resume and path.suffix.lower() == ".parquet":
        raise ConfigError(
            "a parquet file cannot be resumed", where=str(path), hint="write .jsonl or .csv, which can be resumed"
        )
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {path.absolute().parent}", where=str(path), hint="make it first")
        return
    if isinstance(data, str | Path) and Path(data).exists() and path.samefile(data):
        raise ConfigError(f"{path} is the file of the rows itself", hint="write the answers to another file")
    if not path.is_file():
        raise ConfigError(f"{path} is no file", hint="name a file")
    if not (resume or overwrite):
        going_on = "" if path.suffix.lower() == ".parquet" else "--resume (resume=True) goes on with it, "
        raise ConflictError(
            f"{path} exists", where=str(path), hint=f"{going_on}--overwrite (overwrite=True) replaces it"
        )


def _say_how_to_resume(error: ErrorReport, work: _Work) -> None:
    of = "" if work.answerer.source.total is None else f" of {work.answerer.source.total:,}"
    error.recovered = f"{work.in_file:,}{of} rows are in {work.path}"
    if work.path.suffix.lower() != ".parquet":
        going_on = "the same command with --resume (resume=True) goes on there"
        error.hint = f"{error.hint}; {going_on}" if error.hint else going_on


class _Work:
    """The chunks of a source, answered and written; those that the file has already are compared with it."""

    def __init__(self, answerer: Answerer, path: Path) -> None:
        self.answerer, self.path = answerer, path
        self.on_progress: StreamProgress | None = None
        self.flat = path.suffix.lower() != ".jsonl"
        self.columns: Columns | None = None
        self.file: AnswerFile | None = None
        self.done = self.before = self.in_file = 0
        self._held: list[Answered] = []

    def run(self, written: Iterator[Written] | None) -> None:
        total = self.answerer.source.total
        header = next(written, None) if written is not None and self.flat else None
        there = iter(()) if written is None else written
        end = header.end if header is not None else 0
        begun = False
        for rows in chunks_of(self.answerer.source, self.answerer.unit):
            already = [pair for _, pair in zip(rows, there, strict=False)]
            self._check_own(rows, already)
            end = already[-1].end if already else end
            self.before += len(already)
            self.in_file = self.before
            # A chunk that is there as a whole is answered again only until an answer is compared: is it this adapter's?
            if len(already) == len(rows) and self.columns is not None:
                self.done += len(rows)
                reason = self.columns.reason
                self.answerer.count(rows, [there.row[reason] or None for there in already])
                continue
            if not begun and self.on_progress is not None:
                self.on_progress(self.done, total)
                begun = True
            answered = self.answerer(rows, shifted(self.on_progress, self.done, total))
            self._name_columns(answered, header)
            if already:
                self._check_answers(answered, already)
            self._write(answered[len(already) :], end if self.before else None)
            self.done += len(rows)
            self.in_file = self.done - len(self._held)
            if self.on_progress is not None:
                self.on_progress(self.done, total)
        if next(there, None) is not None:
            raise self._other(f"it has more rows than {self.answerer.source.name}")
        self._write([], end if self.before else None, last=True)

    def _name_columns(self, answered: Sequence[Answered], header: Written | None) -> None:
        answer = next((one.answer for one in answered if one.answer is not None), None)
        if self.columns is not None or answer is None:
            return
        self.columns = Columns.of(self.answerer.source.columns, answer, flat=self.flat)
        self._answer = answer
        if header is not None and list(header.row) != list(self.columns.names):
            raise self._other(f"its columns are {', '.join(header.row)}, and should be {', '.join(self.columns.names)}")

    def _write(self, answered: Sequence[Answered], keep: int | None, *, last: bool = False) -> None:
        """Write rows, which wait until the first answer says what columns there are."""
        self._held += answered
        if self.columns is None:
            if not last:
                return
            self.columns, self._answer = Columns.of(self.answerer.source.columns, {}, flat=self.flat), {}
        if self.file is None and (self._held or last):  # opening cuts off what follows the rows that are there
            self.file = open_answers(self.path, self.columns, self.answerer.source, self._answer, keep)
        if self.file is not None and self._held:
            try:
                self.file.write(self._held)
            except OSError as error:
                raise ResourceError(f"{self.path} cannot be written: {error.strerror}", where=str(self.path)) from None
            self._held = []

    def _check_own(self, rows: Sequence[SourceRow], already: Sequence[Written]) -> None:
        """Compare the rows' own columns with those in the file."""
        write = as_cell if self.flat else as_json
        for row, there in zip(rows, already, strict=False):
            for name in self.answerer.source.columns:
                if name not in there.row or there.row[name] != write(row.cells.get(name)):
                    raise self._other(f"its row for {row.place} differs in `{name}`")

    def _check_answers(self, answered: Sequence[Answered], already: Sequence[Written]) -> None:
        """Compare what is answered now with what the file has for the same rows."""
        assert self.columns is not None
        pairs = list(zip(map(self.columns.row, answered), already, strict=False))
        same = sum(self._alike(now, there.row) for now, there in pairs)
        if same < SAME * len(pairs):
            raise self._other(f"{len(pairs) - same:,} of its first {len(pairs):,} answers are not this adapter's")

    def _alike(self, now: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
        assert self.columns is not None
        names = list(self.columns.answer.values())
        numbers = [name for name in names if isinstance(now[name], float | Mapping)]
        # a label may hang in the balance; its scores do not
        return all(_near(now[name], there.get(name), self.flat) for name in numbers or names)

    def _other(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.path} does not belong to these rows and this adapter: {why}",
            where=str(self.path),
            hint="--overwrite (overwrite=True) starts it over; or name another file",
        )

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.file is not None:
            file, self.file = self.file, None
            file.close()


def _near(now: Any, there: Any, flat: bool) -> bool:
    if isinstance(now, Mapping):
        return isinstance(there, Mapping) and all(_near(value, there.get(key), flat) for key, value in now.items())
    if isinstance(now, float):
        try:
            return abs(now - float(there)) <= TOLERANCE
        except (TypeError, ValueError):
            return False
    return bool((as_cell(now) if flat else as_json(now)) == there)
