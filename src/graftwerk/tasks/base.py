"""What a task is: how rows are read, encoded, batched, scored. One file per task; the loop knows only this contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from graftwerk.data.findings import Finding as Finding
from graftwerk.data.settings import DataSettings

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
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] | None
    fingerprint: str
    findings: tuple[Finding, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One encoded row. ``inputs`` holds lists of token ids and the like; ``target`` what the loss compares with."""

    inputs: dict[str, list[int]]
    target: Any
    truncated: int = 0
    """Tokens that did not fit."""

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Predictions:
    """What a model said about rows, in the order of the rows.

    For classification ``scores`` is (rows, classes), softmaxed.
    """

    scores: np.ndarray
    targets: np.ndarray | None
    loss: float | None


class Task(ABC):
    """The contract. A task object holds settings only; it never holds a model or rows."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of the columns it needs: ``("text", "label")``."""
    main_metric: ClassVar[str]
    head: ClassVar[bool]
    """Whether the task puts a head of its own on the model."""

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

    @abstractmethod
    def loss(self, outputs: Any, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch, a scalar, from the model's outputs (logits), in float32."""

    @abstractmethod
    def weight(self, batch: dict[str, Tensor]) -> int:
        """How many targets the mean in `loss` is over; micro-batches are weighted by it."""

    @abstractmethod
    def predictions(self, logits: Sequence[Tensor], targets: Sequence[Any] | None, loss: float | None) -> Predictions:
        """Gather the per-batch logits (already in row order) into one result."""
