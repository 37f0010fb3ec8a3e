"""The rows that `evaluation.retained` names, read and encoded before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.data.findings import Issue
from graftwerk.data.settings import DataSettings
from graftwerk.data.split import fold
from graftwerk.errors import ConfigError
from graftwerk.evaluation.held_out import first_held_out, own_splits
from graftwerk.evaluation.loading import Target, find, labels_of, task_of
from graftwerk.evaluation.sample_outputs import sample_rows
from graftwerk.evaluation.settings import GENERAL, EvaluationSettings, RetainedSettings
from graftwerk.sanitize import strings_in
from graftwerk.serialization.info import WEIGHTS_FILE
from graftwerk.tasks import dataset_cache
from graftwerk.tasks.base import Example, Row, Splits, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL_FILES = tuple(f"pkg://graftwerk/evaluation/general/{name}.jsonl" for name in ("measured", "kept"))
PLAIN = {"AutoModelForCausalLM": "causal", "AutoModelForMaskedLM": "masked"}
"""The task that gives the perplexity of plain text, by the class that loads the run's model."""


@dataclass(frozen=True)
class Retained:
    """Rows of one entry of `evaluation.retained`.

    Attributes:
        name: Name of the entry.
        task: The task of the rows, which may have another head than the run's.
        splits: All rows of the source; ``train`` are for strategies against forgetting, never measured.
        split: Split that is measured.
        rows: Its rows that are measured.
        examples: These rows, encoded.
        folder: Adapter folder whose head answers, or None if the model has no head for the task.
        base: Fingerprint of the base that this adapter was trained on, or None.
        max_length: Longest row in tokens.
        origin: Where the rows are from.
        weights: CRC-32 of the adapter's weights, or None if there are none or the folder does not say it.
        evaluation: Settings of the earlier run, by which its answers are written, or None for those of this run.
    """

    name: str
    task: Task
    splits: Splits
    split: str
    rows: Sequence[Row]
    examples: Sequence[Example]
    folder: Path | None
    base: str | None
    max_length: int
    origin: str
    weights: int | None = None
    evaluation: EvaluationSettings | None = None

    @property
    def identity(self) -> str:
        """Return what tells rows and weights of the entry from others of the same name."""
        return self.splits.fingerprint if self.weights is None else f"{self.splits.fingerprint}:{self.weights:08x}"

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
        """Return the encoded rows of another split."""
        return self.task.encode(getattr(self.splits, split), tokenizer, self.splits, self.max_length)


def read_retained(
    settings: RunConfig, task: Task, architecture: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Retained, ...]:
    """Read and encode the rows of each entry; no model is loaded.

    Raises:
        ConfigError: An entry's task needs another kind of model than the run's; or it names nothing to measure on.
        GraftwerkError: As reading rows and adapter folders raises it.
    """
    return tuple(
        _read_entry(name, entry, task, architecture, tokenizer, max_length)
        for name, entry in settings.evaluation.retained.items()
    )


def check_retained(train: Iterable[Row], retained: Sequence[Retained]) -> list[Issue]:
    """Return an issue for each entry with rows that the run trains on; white space and case do not count."""
    if not retained:
        return []
    known, issues = {_text_of(row) for row in train}, []
    for entry in retained:
        repeated = [row for row in entry.rows if _text_of(row) in known]
        if repeated:
            message = (
                f"{len(repeated):,} of {len(entry.rows):,} rows that tell what is forgotten of `{entry.name}` also "
                "stand in the train rows: less seems lost than is"
            )
            hint = "leave them out of data.train, or name other rows in evaluation.retained"
            issues.append(Issue("retained-rows", message, len(repeated), example=_text_of(repeated[0])[:80], hint=hint))
    return issues


def _text_of(row: Row) -> str:
    """Return the longest text of a row, as rows are compared: what is asked, and no label."""
    return fold(max(strings_in(row), key=len, default=""))


def _read_entry(
    name: str,
    entry: RetainedSettings,
    own_task: Task,
    architecture: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Retained:
    where = f"evaluation.retained.{name}"
    folder = base = weights = evaluation = None
    if entry.texts is not None:
        task, splits = _read_texts(entry, own_task, architecture, where)
        origin = entry.texts
    elif entry.run is None:
        assert entry.data is not None
        if own_task.has_head:
            raise ConfigError(
                f"before the training there is no head that could answer rows of {own_task.name}",
                where=where,
                hint="name the earlier run whose head answers them as well: run: runs/earlier",
            )
        task, origin = own_task, entry.data
        splits = _measured(_read_rows(own_task, entry.data, entry.columns, ()))
    else:
        found = find(entry.run)
        own = found.manifest or found.info.own
        task, splits = _read_run(found, own, entry, architecture, where)
        origin = entry.data or entry.run
        evaluation = None if found.settings is None else found.settings.evaluation
        weights = (found.info.written(WEIGHTS_FILE) or {}).get("crc32")
        if task.has_head:
            folder, base = found.info.folder, (own.get("base_fingerprint") or found.info.base_fingerprint)
        stored = own.get("max_length")
        max_length = stored if isinstance(stored, int) and stored > 0 else max_length
    if task.auto_class() is not own_task.auto_class():
        raise ConfigError(
            f"{task.name} is answered by another kind of model than {own_task.name}, which this run trains",
            where=where,
            hint="measure it in a run on a model of its kind",
        )
    split, rows = first_held_out(splits)
    if entry.max_rows is not None:
        rows = [rows[place] for place in sample_rows(len(rows), entry.max_rows)]
    examples = task.encode(rows, tokenizer, splits, max_length)
    return Retained(
        name,
        task,
        splits,
        split,
        rows,
        examples,
        folder,
        base,
        max_length,
        origin,
        weights=weights,
        evaluation=evaluation,
    )


def _read_texts(entry: RetainedSettings, own: Task, architecture: Any, where: str) -> tuple[Task, Splits]:
    from graftwerk.tasks.registry import parse_task

    kind = own.auto_class().__name__
    if kind not in PLAIN:
        raise ConfigError(
            f"a model for {own.name} gives plain text no likelihood, so there is no perplexity",
            where=where,
            hint="causal and masked models do; here name an earlier run: run: runs/earlier",
        )
    task = parse_task(PLAIN[kind]).for_model(architecture)
    assert entry.texts is not None
    if entry.texts != GENERAL:
        return task, _measured(_read_rows(task, entry.texts, entry.columns, ()))
    measured, kept = (dataset_cache.read(task, all_of(file, {}), ()) for file in GENERAL_FILES)
    return task, _measured(measured, train=kept.train)


def _read_run(
    found: Target, own: Mapping[str, Any], entry: RetainedSettings, architecture: Any, where: str
) -> tuple[Task, Splits]:
    labels = labels_of(found.info, dict(own), architecture)
    task = task_of(found.info, own).for_model(architecture).with_labels(labels)
    settings = found.settings
    if entry.data is not None:
        columns = entry.columns or (settings.data.columns if settings else {})
        return task, _measured(_read_rows(task, entry.data, columns, labels))
    if settings is None:
        raise ConfigError(
            f"{found.info.folder} is an adapter folder alone and has no rows of its own",
            where=where,
            hint="name the run folder that it came from, or rows beside it: data: rows.csv",
        )
    splits = own_splits(task, settings, labels, (own.get("data") or {}).get("fingerprint"))
    return task, _with_labels(splits, labels)


def _read_rows(task: Task, data: str, columns: Mapping[str, str], labels: Sequence[str]) -> Splits:
    return _with_labels(dataset_cache.read(task, all_of(data, columns), labels or None), labels)


def all_of(data: str, columns: Mapping[str, str]) -> DataSettings:
    """Return settings that read every row of a file."""
    return DataSettings(train=data, columns=dict(columns), validation=None)


def _with_labels(splits: Splits, labels: Sequence[str]) -> Splits:
    return replace(splits, labels=tuple(labels) or None, cache_key=None)


def _measured(splits: Splits, train: Sequence[Any] = ()) -> Splits:
    """Return the rows of a file as test rows."""
    return replace(splits, test=splits.train, train=train, cache_key=None)
