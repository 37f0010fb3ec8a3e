"""The base beside the adapter: sample answers of both, and the base's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.generation import answer_limit, generate
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.modeling.attach import disabled
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_rows(rows: int, wanted: int) -> list[int]:
    """Return row indices evenly spaced over all rows, so that nobody selected them."""
    count = min(rows, wanted)
    return [place * rows // count for place in range(count)]


def before_and_after(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    predictions: Predictions,
    *,
    dtype: torch.dtype = torch.float32,
    base: Predictions | None = None,
) -> list[dict[str, str | None]]:
    """Return sample answers of the base and of the adapter.

    Args:
        model: The base with the adapter attached.
        task: The task.
        examples: The encoded rows.
        tokenizer: The model's tokenizer.
        settings: Settings of evaluation, with the number of samples.
        predictions: The adapter's predictions of all examples.
        dtype: Compute type.
        base: The base's predictions of all examples, or None to generate them now, for the sampled rows only.

    Returns:
        ``source``, ``reference``, ``before`` (the base's answer) and ``after`` (the adapter's) of each sampled row;
        empty for tasks that do not generate text. ``before`` is None if the base's weights no longer exist (full
        fine-tuning that did not store them).
    """
    if not isinstance(task, TextTask) or not isinstance(predictions, TextPredictions) or predictions.texts is None:
        return []
    rows = sample_rows(len(examples), settings.examples)
    before: Sequence[str | None] = [None] * len(rows)
    if isinstance(base, TextPredictions) and base.texts is not None:
        before = [base.texts[row] for row in rows]
    elif rows:
        most = settings.max_new_tokens or answer_limit(examples)  # as the adapter had
        asked = settings.model_copy(update={"max_new_tokens": most})
        try:
            with disabled(model):
                before = generate(model, task, [examples[row] for row in rows], tokenizer, asked, dtype=dtype)
        except UnsupportedError:
            pass
    return [
        {
            "source": task.decoder.source(examples[row]),
            "reference": task.decoder.reference(examples[row]),
            "before": own,
            "after": predictions.texts[row],
        }
        for row, own in zip(rows, before, strict=True)
    ]


def of_base(model: PreTrainedModel, measure: Callable[[], Predictions]) -> Predictions:
    """Return the predictions of ``measure`` with all adapters disabled.

    Raises:
        UnsupportedError: The base's weights no longer exist, after full fine-tuning that did not store them.
    """
    with disabled(model):
        return measure()


def check_baseline(task: Task) -> None:
    """Check that the base can be evaluated without the adapter.

    Raises:
        ConfigError: The base has no head for this task, so it has no metrics of its own.
    """
    if task.has_head:
        raise ConfigError(
            f"the unadapted base has no head for {task.name}, so it has no metrics",
            where="evaluation.baseline",
            hint="leave it out; `methods=probe` in a comparison trains a head alone",
        )
