"""A task: its settings, how its rows are read and encoded, and the components that batch, train and decode them.

    sources of rows     Task.read                     Splits                      checked and split; no model yet
    rows                Task.encode                   list[Example]               token ids and target of each row
    examples            Collator.collate              input_ids (B, T), labels    padded to the longest
    batch               Objective.forward, loss       outputs, ()                 mean over the targets of the batch
    outputs             Objective.per_row_outputs     (B, width)                  on the CPU
    all rows            Decoder.predictions           Predictions                 what metrics are computed from

Reading and encoding belong to the task itself, since they depend on its settings; batching, the loss and predictions
are components of their own, and `Generation` is one more of tasks that generate text. Features that belong to one kind
of task ask for it by class: generation (`TextTask`), class weights (`Classification`), numbers that want 32 bits
(`Regression`), several data sets (`Multitask`). One file per task.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class Task(Settings):
    """Settings of one task; a task holds neither a model nor rows. Subclasses are final or abstract.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from graftwerk.tasks.classification import Classification
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        >>> rows = [{"text": "good film", "label": "yes"}, {"text": "what a film", "label": "no"}]
        >>> task, splits = Classification(), Splits(rows, [], [], labels=("no", "yes"), fingerprint="")
        >>> batch = task.collator.collate(task.encode(rows, tokenizer, splits, max_length=8), tokenizer)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 3, 0], [1, 1, 3]], [1, 0])
    """

    name: ClassVar[str]
    title: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Names of the fields of a row: ``("text", "label")``."""
    metrics: ClassVar[tuple[str, ...]]
    """Names in `evaluation.metrics.METRICS`; the first decides a comparison."""
    best_metric: ClassVar[str]
    """The metric that chooses the checkpoint: one of `metrics`, or `loss`."""
    has_head: ClassVar[bool]
    """True if the task puts a head of its own on the model."""
    generates: ClassVar[bool] = False
    """True if the model generates text as its answer."""
    label_smoothing: ClassVar[bool] = True
    """True if `training.label_smoothing` has a meaning for its loss."""

    # -- a row becomes an example --------------------------------------------------------------------------------------

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

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Tokenize rows, in order. A row without an answer gets the target None.

        Args:
            rows: Rows with the task's `fields`.
            tokenizer: The model's tokenizer.
            splits: The splits that the rows are from, for class names and the locations of errors.
            max_length: Maximum tokens of an example, special tokens included; `Example.truncated` counts those cut off.

        Raises:
            DataError: A row has an unknown label, or does not fit the model's chat template.
        """

    # -- an example becomes a loss and a prediction --------------------------------------------------------------------

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Return the component that pads examples into batches."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Return the component that runs the model on a batch and computes the loss."""

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """Return the component that turns model outputs into predictions."""

    # -- the model -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def auto_class(self) -> Any:
        """Return the `Auto*` class of transformers that loads a model with the right head."""

    @abstractmethod
    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        """Return the keyword arguments of ``from_pretrained``: ``num_labels``, ``id2label``, ``label2id``."""

    # -- binding to a model and to rows --------------------------------------------------------------------------------

    def for_model(self, config: PreTrainedConfig) -> Self:
        """Return the task bound to a kind of model; most tasks are the same for all.

        Raises:
            UnsupportedError: A model of this kind cannot do the task.
        """
        return self

    def resolved(self, splits: Splits) -> Self:
        """Return the task with the settings that a run's rows determine, such as the languages of a translation."""
        return self

    def with_labels(self, labels: Sequence[str]) -> Self:
        """Return the task bound to the label names of a run or an adapter; most tasks need none."""
        return self

    def head_bias(self, examples: Sequence[Example], labels: Sequence[str]) -> list[float] | None:
        """Return the bias that the head's last layer starts from, or None for zeros."""
        return None

    def tuned(self, predictions: Predictions) -> tuple[Self, Predictions]:
        """Return the task with what the validation rows decide after training (thresholds), and their predictions so.

        Args:
            predictions: Those of the validation rows, by the best state.
        """
        return self, predictions

    # -- rows and answers in words -------------------------------------------------------------------------------------

    def example_from_text(self, text: str) -> Row:
        """Return a row that holds only the input text."""
        return {self.fields[0]: text}

    def labels_in(self, row: Row) -> Sequence[str]:
        """Return the names of the labels of a labelled row, to count them."""
        return (str(row["label"]),) if "label" in row else ()

    def target_text(self, target: Any, labels: Sequence[str] | None) -> str | None:
        """Return an example's target in words, or None if it is text itself, or unknown."""
        if not isinstance(target, int):
            return None
        return labels[target] if labels else str(target)

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """Return an answer of the decoder with what only the row tells."""
        return answer

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def main_metric(self) -> str:
        """Return the metric that decides a comparison."""
        return self.metrics[0]

    @property
    def can_pack(self) -> bool:
        """Return True if several examples can be packed into one row (`tasks.packing`)."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the name and all settings, as plain JSON."""
        return {"name": self.name, **self.model_dump(mode="json")}
