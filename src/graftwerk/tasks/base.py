"""A task: its settings, how its rows are read and encoded, and the parts that train it and score it.

Reading and encoding are of the task itself, since they depend on its settings; what a batch is, what is learnt from it
and what comes out are parts of their own: `Collator`, `Objective`, `Decoder` and, for tasks in which a model writes,
`Generation`. The training loop and evaluation know these contracts alone. One file per task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from graftwerk.data.findings import Issue as Issue
from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import RowFormat
from graftwerk.settings import Settings
from graftwerk.tasks.collator import Collator
from graftwerk.tasks.decoder import Decoder
from graftwerk.tasks.example import Example as Example
from graftwerk.tasks.example import Row as Row
from graftwerk.tasks.objective import Objective
from graftwerk.tasks.predictions import Predictions as Predictions
from graftwerk.tasks.splits import Splits as Splits


class Task(Settings):
    """The settings of one task; a task never holds a model or rows. Subclasses are final or abstract."""

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of the columns it needs: ``("text", "label")``."""
    metrics: ClassVar[tuple[str, ...]]
    """Names in `evaluation.metrics.METRICS`; the first decides a comparison."""
    best_metric: ClassVar[str]
    """The metric that chooses the checkpoint: one of `metrics`, or `loss`."""
    head: ClassVar[bool]
    """True if the task puts a head of its own on the model."""
    generates: ClassVar[bool] = False
    """True if answers are texts that the model writes."""

    @property
    def main_metric(self) -> str:
        """Return the metric that decides a comparison."""
        return self.metrics[0]

    @property
    def packs(self) -> bool:
        """Return True if several of its rows can stand in one (`tasks.packing`)."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the name and all settings, as plain JSON."""
        return {"name": self.name, **self.model_dump(mode="json")}

    # -- settings that depend on a model or on rows ----------------------------------------------------------------

    def for_model(self, architecture: Any) -> Self:
        """Return the task as it is for a model; most are the same for all.

        Args:
            architecture: The model's transformers configuration.

        Raises:
            UnsupportedError: Such a model cannot do it.
        """
        return self

    def resolved(self, splits: Splits) -> Self:
        """Return the task with the settings that a run's rows determine, such as the languages of a translation."""
        return self

    @abstractmethod
    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained``: ``num_labels``, ``id2label``, ``label2id``."""

    @abstractmethod
    def auto_class(self) -> Any:
        """Return the `Auto*` class of transformers that loads the right model."""

    # -- rows ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def row_format(self, columns: Sequence[str]) -> RowFormat:
        """Return the format of rows whose source has these columns.

        Raises:
            ConfigError: Rows with such columns do not suit this task.
        """

    @abstractmethod
    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        """Read, check and split the rows; no model is loaded.

        Args:
            data: The sources and how they are split.
            labels: The label names of an adapter. Rows must use these, and may use fewer.

        Raises:
            ConfigError: No such source, column or split size.
            DataError: Unreadable or unusable rows, with file and line.
            AdapterError: The rows have classes that ``labels`` lacks.
            ResourceError: A source cannot be reached.
        """

    def example_from_text(self, text: str) -> Row:
        """Return the row of a bare text that a model is asked about."""
        return {self.parts[0]: text}

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: Any, splits: Splits, max_length: int) -> list[Example]:
        """Tokenize rows, in order. A row without an answer gets the target None.

        Args:
            rows: Rows with the task's `parts`.
            tokenizer: The model's tokenizer.
            splits: The splits that the rows are from, for class names and places of errors.
            max_length: Tokens kept of a row, special tokens included; each example counts the ones it lost.

        Raises:
            DataError: A row has an unknown label, or does not fit the model's template.
        """

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Return the part that makes batches of examples."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Return the part that runs the model on a batch and computes the loss."""

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """Return the part that makes predictions of the model's outputs."""
