"""Evaluation during training: predictions on held-out rows, and comparison of states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.devices import is_out_of_memory, release
from graftwerk.errors import ConfigError, DivergedError
from graftwerk.evaluation.inference import Serve, batches_of, refuse_broken_base
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.text import TextTask
from graftwerk.training.class_weights import check_class_weights
from graftwerk.training.distributed import Distributed
from graftwerk.training.distributed.predictions import deal_batches, gather_predictions
from graftwerk.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEED_ROWS = ("eval_steps", "early_stopping_patience", "metric_for_best")


class StopEvaluation(Exception):  # noqa: N818 - no error: a signal came
    """Raised out of an evaluation after a stop signal; nothing has changed."""


class Evaluator:
    """Predict rows; the batch is halved if memory runs out.

    Args:
        adapter: Adapter whose model predicts.
        task: Task that collates the rows.
        tokenizer: Tokenizer of the model.
        processes: Processes that evaluate together.
        batch_size: Rows of a forward pass.
        dtype: Type that forward passes compute in.
        stop_requested: Function that is asked after every batch of a single process; several have to stay together.
        say: Function that is told in words when the batch is halved.
        serve: As for `run_model`.
    """

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        processes: Distributed,
        *,
        batch_size: int,
        dtype: torch.dtype,
        stop_requested: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
        serve: Serve | None = None,
    ) -> None:
        self.adapter, self.task, self.tokenizer, self.processes = adapter, task, tokenizer, processes
        self.batch_size, self.dtype, self.stop_requested, self.say = batch_size, dtype, stop_requested, say
        self.serve = serve
        self._dealt = batch_size
        """Rows that are dealt out together: the same on all processes, even if one of them has halved its batch."""

    def __call__(self, examples: Sequence[Example], generation: EvaluationSettings | None = None) -> Predictions:
        """Return predictions in the order of the rows, on every process; the model's mode is restored.

        Args:
            examples: Encoded rows.
            generation: Settings of generation, for tasks that generate; None generates nothing, which is much faster.

        Raises:
            StopEvaluation: A stop signal came.
            DivergedError: The scores are not finite.
        """
        with self.processes.gathered(self.adapter.model):
            return self._evaluate(examples, generation)

    def _evaluate(self, examples: Sequence[Example], generation: EvaluationSettings | None) -> Predictions:
        batches = batches_of(examples, self._dealt)
        if self.processes.world_size == 1 or len(batches) < self.processes.world_size:
            predictions = self._predict(examples, generation)
        else:
            shares = deal_batches(batches, self.processes.world_size)
            own = self._predict([examples[row] for row in shares[self.processes.rank]], generation)
            self.processes.barrier()  # rows of one share may take much longer to generate than those of another
            predictions = gather_predictions(self.processes, own, shares)
        if not predictions.finite:
            refuse_broken_base(self.adapter.model)
            raise DivergedError(
                "the model's scores are not finite",
                hint="a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm=1",
            )
        return predictions

    def _predict(self, examples: Sequence[Example], generation: EvaluationSettings | None) -> Predictions:
        from graftwerk.evaluation.evaluate import run_model
        from graftwerk.evaluation.generation import generate

        training = self.adapter.model.training
        texts: list[str] | None = None
        while True:
            try:
                if texts is None and generation is not None and isinstance(self.task, TextTask):
                    generation = generation.model_copy(
                        update={"generation_batch_size": min(generation.generation_batch_size, self.batch_size)}
                    )
                    texts = generate(
                        self.adapter.model,
                        self.task,
                        examples,
                        self.tokenizer,
                        generation,
                        dtype=self.dtype,
                        on_progress=self._on_progress,
                        say=self.say,
                    )
                predictions: Predictions = run_model(
                    self.adapter.model,
                    self.task,
                    examples,
                    self.tokenizer,
                    batch_size=self.batch_size,
                    dtype=self.dtype,
                    on_progress=self._on_progress,
                    texts=texts,
                    serve=self.serve,
                )
                return predictions
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
            finally:
                self.adapter.model.train(training)
            release()
            self.batch_size = math.ceil(self.batch_size / 2)
            self.say(f"out of memory in evaluation: continuing with {self.batch_size} rows a batch")

    def _on_progress(self, *_: Any) -> None:
        if self.processes.world_size == 1 and self.stop_requested():
            raise StopEvaluation


def points(predictions: Predictions, task: Task) -> dict[str, float]:
    """Return metrics without intervals, which would cost more than the evaluation of a small split."""
    from graftwerk.evaluation.metrics import check, point

    check(predictions)
    metrics = {} if predictions.loss is None else {"loss": predictions.loss}
    return metrics | {name: value for name in task.metrics if (value := point(name, predictions)) is not None}


def is_better(metric: str, value: float, best: float) -> bool:
    """Return True if a value of a metric is better than the best so far."""
    from graftwerk.evaluation.metrics import METRICS

    return value < best if metric == "loss" or METRICS[metric].higher is False else value > best


def check_settings(settings: TrainingSettings, has_validation: bool, task: Task) -> None:
    """Raise for settings that need validation rows without any, and for unknown metrics.

    Raises:
        ConfigError: The message names the setting.
    """
    watched = settings.retain is not None and settings.retain.early_stopping is not None
    if not has_validation:
        for name in NEED_ROWS:
            if getattr(settings, name) is not None and not (watched and name == "eval_steps"):
                raise ConfigError(
                    f"`{name}` needs validation rows",
                    where=f"training.{name}",
                    hint="set data.validation, or leave it out",
                )
    if watched and not settings.load_best:
        raise ConfigError(
            "the state in which training stops has lost too much, and `load_best: false` would save it",
            where="training.retain.early_stopping",
            hint="leave load_best out",
        )
    if settings.packing and not task.can_pack:
        raise ConfigError(
            f"rows of {task.name} cannot be packed: only what a causal model reads and writes in one row can",
            where="training.packing",
            hint="leave it out",
        )
    check_class_weights(settings, task)
    if settings.label_smoothing and not task.label_smoothing:
        raise ConfigError(
            f"`label_smoothing` has no meaning for {task.name}", where="training.label_smoothing", hint="leave it out"
        )
    known = ("loss", *task.metrics)
    if settings.metric_for_best is not None and settings.metric_for_best not in known:
        raise ConfigError(
            f"there is no metric `{settings.metric_for_best}` for {task.name}",
            where="training.metric_for_best",
            hint=f"there are: {', '.join(known)}",
        )
