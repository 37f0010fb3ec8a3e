"""Distillation: on the run's own rows, the model keeps giving the answers that it gave before.

Source: Li & Hoiem 2016, arXiv:1606.09282 (learning without forgetting); Hinton et al. 2015, arXiv:1503.02531
(temperature).

Loss: weight * t^2 * KL(teacher || student), with scores over the temperature t. The teacher is the model before this
task, as in Li & Hoiem. For tasks with heads the heads of the earlier runs answer the run's own rows once, before the
first step. A model of text is asked in each step, with the adapter's weights of the start in place of today's (after a
warm start), or with the adapter switched off (`teacher: base`): there is no second model in memory, only, for the
former, two copies of what is trained.
Trade-off: needs no row of what is to be retained; holds the model back on its own rows too, and a step of text costs
two more forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.inference import autocast, evaluation_mode, to_device
from graftwerk.modeling.attach import disabled
from graftwerk.tasks.objective import LabelObjective, Objective, ScoreObjective
from graftwerk.tasks.text import TextTask
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retained_rows import Retained
from graftwerk.training.retention.base import KEY, Setting, Strategy
from graftwerk.training.settings import DistillationSettings
from graftwerk.training.step_batches import PreparedStep
from graftwerk.training.stream import EncodedStream


class Distillation(Strategy):
    """Keep the answers to the run's own rows."""

    name: ClassVar[str] = "distillation"
    paper: ClassVar[str] = "Li & Hoiem 2016, arXiv:1606.09282"

    def __init__(self, setting: Setting, settings: DistillationSettings) -> None:
        super().__init__(setting)
        self.settings = settings
        self.recorded: dict[str, Tensor] = {}
        self._places: dict[int, int] = {}
        self._start: dict[str, Tensor] = {}

    def start(self) -> None:
        if isinstance(self.setting.task, TextTask):
            self._keep_start()
            return
        for entry in self._with_heads():
            self.recorded[entry.name] = self._answers(entry)

    def _keep_start(self) -> None:
        """Keep the weights that the teacher answers with, unless it is the base."""
        setting, teacher = self.setting, self.settings.teacher
        if teacher == "start" or (teacher == "auto" and setting.warm):
            self._start = {key: value.detach().clone() for key, value in setting.adapter.named_parameters()}

    def _with_heads(self) -> list[Retained]:
        """Return the entries whose heads answer, and note the places of the run's own rows.

        Raises:
            ConfigError: No head is that of an earlier run, or the base is asked for.
            UnsupportedError: The rows are streamed.
        """
        setting, where = self.setting, f"{KEY}.{self.name}"
        if self.settings.teacher == "base":
            raise ConfigError(
                f"heads of {setting.task.name} were learnt on the model that this run starts from, not on the base",
                where=f"{where}.teacher",
                hint="leave it out",
            )
        found = [entry for entry in setting.meter.entries if setting.meter.heads[entry.name]]
        if not found:
            raise ConfigError(
                f"a head of {setting.task.name} is new, so there are no answers to keep",
                where=where,
                hint="name earlier runs in evaluation.retained, whose heads answer",
            )
        if isinstance(setting.train, EncodedStream):
            raise UnsupportedError("answers to streamed rows are not recorded", where=where, hint="streaming: false")
        self._places = {id(example): place for place, example in enumerate(setting.train)}
        return found

    def hold(self) -> None:
        if isinstance(self.setting.task, TextTask):
            self._keep_start()
            return
        for entry in self._with_heads():
            classes = len(entry.splits.labels or ()) or 1
            self.recorded[entry.name] = torch.zeros(len(self.setting.train), classes, device="cpu")

    def _answers(self, entry: Retained) -> Tensor:
        """Return the scores (N, C) of an entry's head for the run's own rows."""
        setting, model = self.setting, self.setting.adapter.model
        size, found = setting.meter.evaluator.batch_size, []
        with setting.meter.lent(entry), evaluation_mode(model), torch.no_grad():
            for start in range(0, len(setting.train), size):
                piece = setting.train[start : start + size]
                batch = to_device(setting.task.collator.collate(piece, setting.tokenizer), model)
                found.append(setting.task.objective.forward(model, batch).logits.float())
        if found[0].dim() != 2:
            raise UnsupportedError(
                f"answers of {entry.task.name} are not one for each row, and are not recorded",
                where=f"{KEY}.{self.name}",
                hint="replay, or consolidation",
            )
        return torch.cat(found)

    def losses(self, step: int, own: PreparedStep, gradients: GradientAccumulator) -> Iterator[Tensor]:
        total = self.setting.processes.sum_scalar(float(sum(own.weights))) or 1.0
        for batch, weight, examples in zip(own.batches, own.weights, own.examples, strict=True):
            if not weight:
                continue
            factor = self.settings.weight * weight / total
            if isinstance(self.setting.task, TextTask):
                yield factor * self._towards_teacher(gradients.model, batch)
                continue
            rows = [self._places[id(example)] for example in examples]
            for name, answers in self.recorded.items():
                entry = next(entry for entry in self.setting.meter.entries if entry.name == name)
                with self.setting.meter.lent(entry):
                    student = self.setting.task.objective.forward(gradients.model, batch).logits.float()
                    apart = self._apart(entry.task.objective, student, answers[rows], answers)
                    yield factor * apart / len(self.recorded)

    def _towards_teacher(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the divergence from the teacher's words at the labelled tokens of a batch, (B, T) each."""
        objective, own = self.setting.task.objective, self.setting.adapter.model
        cast = autocast(own, self.setting.meter.evaluator.dtype, cache=False)
        with torch.no_grad(), self._teacher(), evaluation_mode(own), cast:
            teacher = objective.forward(own, batch).logits.float()  # (N, V)
        student = objective.forward(model, batch).logits.float()
        return self._divergence(student, teacher)

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        """Let the base answer, or the weights of the start; nothing waits for a gradient of today's ones."""
        if not self._start:
            with disabled(self.setting.adapter.model):
                yield
            return
        parameters = dict(self.setting.adapter.named_parameters())
        today = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        try:
            for key, parameter in parameters.items():
                parameter.copy_(self._start[key])
            yield
        finally:
            for key, parameter in parameters.items():
                parameter.copy_(today[key])

    def _apart(self, objective: Objective, student: Tensor, teacher: Tensor, answers: Tensor) -> Tensor:
        """Return how far scores (B, C) are from the recorded ones; numbers, over the variance of all answers (N, C)."""
        if isinstance(objective, ScoreObjective):
            return F.mse_loss(student, teacher) / answers.var().nan_to_num().clamp_min(1e-6)
        if isinstance(objective, LabelObjective):
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid()) - F.binary_cross_entropy_with_logits(
                teacher, teacher.sigmoid()
            )
        return self._divergence(student, teacher)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return t^2 KL(teacher || student), the mean over rows of scores (N, C); 0 for none."""
        if not len(student):
            return student.sum()
        t = self.settings.temperature
        return t**2 * F.kl_div(
            (student / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="batchmean", log_target=True
        )

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for held in (self.recorded, self._start) for tensor in held.values())
