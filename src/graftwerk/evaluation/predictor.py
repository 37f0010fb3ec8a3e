"""`open`: a trained adapter on its base, with tokenizer and labels, ready to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from graftwerk.data.rows import Table
from graftwerk.data.splits_reader import unanswered
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.evaluate import answer_examples, truncation_notes, with_settings
from graftwerk.evaluation.loading import LoadedAdapter, load_adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from graftwerk.tasks.base import Row, Task

Question = str | Mapping[str, Any]
"""A text, or a row with the fields of the task."""


class Predictor:
    """A trained adapter that answers texts and rows.

    Attributes:
        model: The base with the adapter attached and active, in evaluation mode.
        tokenizer: The model's tokenizer.
        task: The task it was trained for.
        labels: Names of the classes in the order of the head's outputs, or empty if the task has none.
        notes: What was cut or left unused in the last call.
    """

    def __init__(self, loaded: LoadedAdapter) -> None:
        self._loaded = loaded
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.task: Task = loaded.task
        self.labels: tuple[str, ...] = tuple(loaded.labels)
        self.notes: list[str] = []

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, questions: str | Mapping[str, Any], *, batch_size: int | None = None
    ) -> dict[str, Any]: ...

    @overload
    def __call__(self, questions: Sequence[Question], *, batch_size: int | None = None) -> list[dict[str, Any]]: ...

    def __call__(
        self, questions: Question | Sequence[Question], *, batch_size: int | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer one question, or several in their order.

        Args:
            questions: A text or a row, or several of them.
            batch_size: Rows per forward pass. Default: as in the run's own evaluation.

        Returns:
            The answer of each: ``label`` and ``scores``, or ``output`` for tasks that generate text.

        Raises:
            ConfigError: A question is neither a text nor a row, or the rows lack a field of the task.
            DataError: A text is empty, or a row cannot be used.
        """
        one = isinstance(questions, str | Mapping)
        listed: Sequence[Any] = [questions] if one else list(questions)
        if not listed:
            return []
        rows = _rows(self.task, listed)
        examples = self._loaded.encode(rows)
        self.notes = truncation_notes(self._loaded, examples)
        answers = answer_examples(
            self._loaded, examples, rows, batch_size=batch_size or self._loaded.eval_batch_size, say=self.notes.append
        )
        return answers[0] if one else answers

    def __repr__(self) -> str:
        return f"<Predictor: {self._loaded.method_name()} for {self.task.name} on {self._loaded.info.base_name}>"


def _rows(task: Task, questions: Sequence[Any]) -> list[Row]:
    """Return questions as rows of the task: texts as its input, mappings read as the rows of a file are."""
    rows: list[Row] = []
    for place, question in enumerate(questions, start=1):
        if isinstance(question, Mapping):
            raw = Table("the rows given", f"question {place}", [dict(question)], [place], columns=tuple(question))
            rows += unanswered(raw, task.row_format)[0].rows
        elif not isinstance(question, str):
            raise ConfigError(f"question {place} is {type(question).__name__}, neither a text nor a row")
        elif not question.strip():
            raise DataError(f"question {place} of {len(questions)} is empty")
        else:
            rows.append(task.example_from_text(question))
    return rows


def open_adapter(
    target: Any, *, model: str | None = None, force: bool = False, evaluation: Mapping[str, Any] | None = None
) -> Predictor:
    """Open a trained adapter for use: base, tokenizer and labels are found and loaded.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        evaluation: Settings of evaluation in place of the run file's: ``{"num_beams": 4}``.

    Returns:
        The predictor. Call it with a text, a row, or a list of these.

    Raises:
        ConfigError: There is no adapter.
        AdapterError, ModelError, IntegrityError, ResourceError: As for loading models and adapters.

    Example:
        >>> import graftwerk as gw
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = gw.save(gw.attach(model, gw.LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> predictor = gw.open(folder)
        >>> sorted(predictor("good")["scores"])
        ['negative', 'positive']
        >>> len(predictor(["good", "bad"]))
        2
    """
    return Predictor(with_settings(load_adapter_for(target, model=model, force=force), evaluation))
