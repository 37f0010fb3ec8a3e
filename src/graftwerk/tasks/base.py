"""What a task is: how rows are read, encoded, batched, scored. One file per task; the loop knows only this contract."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from graftwerk.data.checks import check_duplicates, missing_in, missing_texts
from graftwerk.data.findings import Issue as Issue
from graftwerk.data.near_duplicates import check_near_leakage
from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import RowFormat, SplitRows, fingerprint_of, origin_of
from graftwerk.data.stream import Streamed
from graftwerk.settings import Settings
from graftwerk.tasks.predictions import Predictions as Predictions

Row = dict[str, Any]
"""A row as the task understands it: the parts (`text`, `label`) by name, whatever the columns were called."""


@dataclass(frozen=True)
class Splits:
    """The rows of a run, split once and for all seeds alike.

    Attributes:
        train, validation, test: Rows; validation and test may be empty.
        labels: For tasks with classes, their names in the order of their ids.
        fingerprint: Hash of the rows of all three splits in order, and of the settings that made them.
        findings: What was noticed while reading (dropped rows, duplicates, leakage).
        origin: Where the rows came from, for the manifest and the model card.
        where: For each split, the place (`file:line`) of a row by its index.
        kept: The key under which `tasks.kept` keeps them; None: they are not kept.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] | None
    fingerprint: str
    issues: tuple[Issue, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    where: Mapping[str, Callable[[int], str]] = field(default_factory=dict)
    cache_key: str | None = None

    def locate(self, rows: Sequence[Row], at: int) -> str | None:
        """`file:line` of a row by its index in `rows`, where these are one of the splits."""
        return next((where(at) for split, where in self.where.items() if rows is getattr(self, split)), None)


def splits_of(
    data: DataSettings,
    chosen: Mapping[str, SplitRows],
    findings: Sequence[Issue],
    parts: Sequence[str],
    *,
    labels: tuple[str, ...] | None = None,
) -> Splits:
    """What `read_splits` chose, checked for repeated rows, with its fingerprint.

    Args:
        findings: What was noticed so far.
        parts: What the fingerprint is of: every part of a row that the task reads.
    """
    rows: dict[str, Any] = {split: part.rows for split, part in chosen.items()}
    placed = {split: part.placed() for split, part in chosen.items()}
    missing = tuple(
        finding
        for split, part in chosen.items()
        for finding in missing_texts(
            split,
            Counter(text for row in rows[split] for text in missing_in(row, part.reading.stratify)),
            len(rows[split]),
        )
    )
    repeated = (*check_duplicates(placed), *check_near_leakage(placed), *missing)
    return Splits(
        **rows,
        labels=labels,
        fingerprint=fingerprint_of(rows, parts, labels or ()),
        issues=(*findings, *repeated),
        origin=origin_of(data, {split: len(part) for split, part in rows.items()}),
        where={split: part.where for split, part in chosen.items()},
    )


def splits_of_stream(
    data: DataSettings,
    streamed: Streamed,
    parts: Sequence[str],
    *,
    labels: tuple[str, ...] | None = None,
    findings: Sequence[Issue] = (),
) -> Splits:
    """The same for training rows that are not held in memory; those of validation and test are."""
    held: dict[str, Any] = {split: part.rows for split, part in streamed.held.items()}
    placed = {"train": streamed.repeated, **{split: part.placed() for split, part in streamed.held.items()}}
    counts = {"train": len(streamed.rows), **{split: len(rows) for split, rows in held.items()}}
    return Splits(
        train=streamed.rows,
        **held,
        labels=labels,
        fingerprint=fingerprint_of(held, parts, [*(labels or ()), streamed.digest]),
        issues=(*streamed.issues, *findings, *check_duplicates(placed)),
        origin=origin_of(data, counts),
        where={"train": streamed.rows.where, **{split: part.where for split, part in streamed.held.items()}},
    )


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Attributes:
        inputs: Lists of token ids and the like, as the model is called.
        target: What the loss compares with: a class id; or token ids, -100 where nothing is trained. None where
            unknown.
        truncated: Tokens that did not fit.
        prompt: For tasks that generate: the token ids that an answer is to follow. None: nothing to generate.
        row: Where the example came from, for metrics that compare texts.
        notes: What is odd about it, in the words of `tasks.findings`, for the checks before training.
    """

    inputs: dict[str, list[int]]
    target: Any
    truncated: int = 0
    prompt: list[int] | None = None
    row: Row | None = None
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


class Task(Settings):
    """The contract, and the settings of one task; it never holds a model or rows. Subclasses are final or abstract."""

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of the columns it needs: ``("text", "label")``."""
    metrics: ClassVar[tuple[str, ...]]
    """What is measured, by the names of `evaluate.metrics.METRICS`; the first decides a comparison."""
    best_metric: ClassVar[str]
    """What chooses the checkpoint: one of `metrics`, or `loss`."""
    head: ClassVar[bool]
    """Whether the task puts a head of its own on the model."""
    generates: ClassVar[bool] = False
    """Whether answers are texts that the model writes."""

    @property
    def main_metric(self) -> str:
        return self.metrics[0]

    @property
    def packs(self) -> bool:
        """Whether several of its rows can stand in one (`tasks.packing`)."""
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.model_dump(mode="json")}

    def for_model(self, architecture: Any) -> Self:
        """The task as it is for a model of this transformers configuration; most are the same for all.

        Raises:
            UnsupportedError: such a model cannot do it.
        """
        return self

    def resolved(self, splits: Splits) -> Self:
        """The task with what the rows of a run fix for good, the languages of a translation say; most fix nothing."""
        return self

    def example_from_text(self, text: str) -> Row:
        """The row that a bare text stands for, where a model is asked about it."""
        return {self.parts[0]: text}

    @abstractmethod
    def row_format(self, columns: Sequence[str]) -> RowFormat:
        """What a row is, in a source whose columns can play these parts.

        Raises:
            ConfigError: rows with such columns are none of this task.
        """

    @abstractmethod
    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        """Read, check and split the rows; nothing of a model is needed or loaded.

        Args:
            labels: The label names an adapter already has; rows must use these.
        Raises:
            DataError: unreadable or unusable rows (faults 10-12), with file and line.
        """

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: Any, splits: Splits, max_length: int) -> list[Example]:
        """Tokenize. Raises DataError where a row's label is unknown."""

    @abstractmethod
    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        """What `from_pretrained` is told (``num_labels``, ``id2label``, ``label2id``)."""

    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers `Auto*` class that loads the right model (imported inside)."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
        """Pad to the longest of the batch; ``labels`` included where there are targets."""

    def collate_training(self, examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
        """As `collate`, for a step of training; what it draws, it draws from torch's generator."""
        return self.collate(examples, tokenizer)

    def forward(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """The model's outputs; targets stay outside, the task computes the loss."""
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"})

    @abstractmethod
    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch, a scalar, from the model's outputs (logits), in float32."""

    @abstractmethod
    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """How many targets the mean in `loss` is over, or what they count; micro-batches are weighted by it."""

    @abstractmethod
    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What is kept of a pass for each row, for `predictions`: (rows, any width), on the CPU."""

    @abstractmethod
    def predictions(
        self, kept: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> Predictions:
        """Everything that was kept, one (1, width) tensor a row in the order of the rows, as one result.

        Args:
            texts: What was generated for each row, if anything was.
        """

    @abstractmethod
    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """For each row, what `predict` says: ``label`` and ``scores``, or ``text``."""
