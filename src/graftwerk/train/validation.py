"""Evaluation inside a training: the model's answers to held-out rows, and which state is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graftwerk.errors import ConfigError, DivergedError
from graftwerk.evaluate.finite import refuse_broken_base
from graftwerk.evaluate.forward import Serve, batches_of
from graftwerk.evaluate.settings import EvaluationSettings
from graftwerk.inject.attach import Graft
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.text import TextTask
from graftwerk.train import memory
from graftwerk.train.class_weights import check_class_weights
from graftwerk.train.launch import Processes
from graftwerk.train.settings import TrainingSettings

NEED_ROWS = ("eval_steps", "early_stopping_patience", "metric_for_best")


class StopEvaluation(Exception):  # noqa: N818 - no error: a signal came
    """Raised out of an evaluation that is to be left; nothing has changed."""


class Evaluator:
    """Asks the model about rows; halves the batch where memory runs out.

    Args:
        batch_size: Rows of a forward pass.
        dtype: What it computes in.
        asked_to_stop: Looked at after every batch, where one process is alone; several have to stay together.
        say: Told in words when the batch is halved.
        serve: As for `run_model`.
    """

    def __init__(
        self,
        graft: Graft,
        task: Task,
        tokenizer: Any,
        processes: Processes,
        *,
        batch_size: int,
        dtype: torch.dtype,
        asked_to_stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
        serve: Serve | None = None,
    ) -> None:
        self.graft, self.task, self.tokenizer, self.processes = graft, task, tokenizer, processes
        self.batch_size, self.dtype, self.asked_to_stop, self.say = batch_size, dtype, asked_to_stop, say
        self.serve = serve
        self._dealt = batch_size
        """Rows that are dealt out together: the same on all processes, also where one of them has halved its batch."""

    def __call__(self, examples: Sequence[Example], generation: EvaluationSettings | None = None) -> Predictions:
        """Answers in the order of the rows, on every process; the model is left in the mode it was in.

        Args:
            generation: How texts are generated, for tasks that have any; None: they are not, which is much faster.

        Raises:
            StopEvaluation: it was asked to stop.
            DivergedError: the answers are not finite.
        """
        batches = batches_of(examples, self._dealt)
        if self.processes.count == 1 or len(batches) < self.processes.count:
            predictions = self._predict(examples, generation)
        else:
            shares = self.processes.shares(batches)
            own = self._predict([examples[row] for row in shares[self.processes.index]], generation)
            predictions = self.processes.together(own, shares)
        if not predictions.finite:
            refuse_broken_base(self.graft.model)
            raise DivergedError(
                "the model's scores are not finite",
                mend="a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm=1",
            )
        return predictions

    def _predict(self, examples: Sequence[Example], generation: EvaluationSettings | None) -> Predictions:
        from graftwerk.evaluate.generation import generate
        from graftwerk.evaluate.run import run_model

        training = self.graft.model.training
        texts: list[str] | None = None
        while True:
            try:
                if texts is None and generation is not None and isinstance(self.task, TextTask):
                    generation = generation.model_copy(
                        update={"generation_batch_size": min(generation.generation_batch_size, self.batch_size)}
                    )
                    texts = generate(
                        self.graft.model,
                        self.task,
                        examples,
                        self.tokenizer,
                        generation,
                        dtype=self.dtype,
                        on_progress=self._on_progress,
                        say=self.say,
                    )
                predictions: Predictions = run_model(
                    self.graft.model,
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
                if not memory.is_out_of_memory(error) or self.batch_size == 1:
                    raise
            finally:
                self.graft.model.train(training)
            memory.release()
            self.batch_size = math.ceil(self.batch_size / 2)
            self.say(f"out of memory in evaluation: going on with {self.batch_size} rows a batch")

    def _on_progress(self, *_: Any) -> None:
        if self.processes.count == 1 and self.asked_to_stop():
            raise StopEvaluation


def points(predictions: Predictions, task: Task) -> dict[str, float]:
    """The metrics' values without intervals, which would cost more than the evaluation of a small split."""
    from graftwerk.evaluate.metrics import check, point

    check(predictions)
    metrics = {} if predictions.loss is None else {"loss": predictions.loss}
    return metrics | {name: value for name in task.metrics if (value := point(name, predictions)) is not None}


def is_better(metric: str, value: float, best: float) -> bool:
    from graftwerk.evaluate.metrics import METRICS

    return value < best if metric == "loss" or METRICS[metric].higher is False else value > best


def check_settings(settings: TrainingSettings, has_validation: bool, task: Task) -> None:
    """Refuses settings that need validation rows where there are none, and metrics that do not exist.

    Raises:
        ConfigError: naming the setting.
    """
    if not has_validation:
        for name in NEED_ROWS:
            if getattr(settings, name) is not None:
                raise ConfigError(
                    f"`{name}` needs validation rows",
                    where=f"training.{name}",
                    mend="set data.validation, or leave it out",
                )
    if settings.packing and not task.packs:
        raise ConfigError(
            f"rows of {task.name} cannot be packed: only what a causal model reads and writes in one row can",
            where="training.packing",
            mend="leave it out",
        )
    check_class_weights(settings, task)
    known = ("loss", *task.metrics)
    if settings.metric_for_best is not None and settings.metric_for_best not in known:
        raise ConfigError(
            f"there is no metric `{settings.metric_for_best}` for {task.name}",
            where="training.metric_for_best",
            mend=f"there are: {', '.join(known)}",
        )
