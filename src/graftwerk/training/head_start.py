"""The start of a task head, and the units of its output.

A new head starts where training would take its bias first: at the frequencies of the labels (`Task.head_bias`). Numbers
are learnt standardised; when training ends, the scale goes into the head's last layer, so that its output is in the
units of the rows whoever runs the model: here, in PEFT, in a merged model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.regression import Regression, scale_of
from graftwerk.training.setup import Prepared

if TYPE_CHECKING:
    from graftwerk.training.trainer import Trainer


@dataclass(frozen=True)
class OutputLayer:
    """The trained parameters of a head's last layer.

    Attributes:
        weight: (C, D).
        bias: (C,), or None if the layer has none.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    @torch.no_grad()
    def standardise(self, mean: float, deviation: float) -> None:
        """Change the output, (B, C), from y to (y - mean) / deviation; without a bias the mean has to be 0."""
        self.weight.div_(deviation)
        if self.bias is not None:
            self.bias.copy_((self.bias.double() - mean) / deviation)

    @torch.no_grad()
    def restore_units(self, mean: float, deviation: float) -> None:
        """Change the output, (B, C), from z to z * deviation + mean; without a bias the mean has to be 0."""
        self.weight.mul_(deviation)
        if self.bias is not None:
            self.bias.copy_(self.bias.double() * deviation + mean)


def output_layer(adapter: Adapter, outputs: int) -> OutputLayer | None:
    """Return the last layer of the head that the adapter trains, or None if it has none of this width.

    Args:
        adapter: The adapter.
        outputs: C, the number of its outputs.
    """
    head = {key: parameter for key, parameter in adapter.named_parameters() if adapter.is_head(key)}
    weights = [key for key, parameter in head.items() if parameter.dim() == 2 and parameter.shape[0] == outputs]
    if not weights:
        return None
    bias = head.get(weights[-1].removesuffix("weight") + "bias")
    return OutputLayer(head[weights[-1]], bias)


def start_head(adapter: Adapter, prepared: Prepared, *, warm: bool) -> Prepared:
    """Give a new head its start, and return the run with the task as it is trained on this head.

    Args:
        adapter: The adapter, with its first values.
        prepared: Rows and task.
        warm: True if the head was trained before; it then keeps its values.

    Raises:
        UnsupportedError: The model's head has no layer that numbers could come from.
    """
    task, labels = prepared.task, prepared.splits.labels or ()
    if isinstance(task, Regression):
        layer = output_layer(adapter, 1)
        if layer is None:
            raise UnsupportedError(
                f"no trained layer of the head of {type(adapter.model).__name__} gives one number",
                where="task",
                hint="train the head: leave method.modules_to_save out",
            )
        scores = [float(example.target) for example in prepared.examples["train"]]
        scale = scale_of(scores, centred=layer.bias is not None)
        if warm:
            layer.standardise(*scale)
        return replace(prepared, task=task.scaled(*scale))
    bias = None if warm else task.head_bias(prepared.examples["train"], labels)
    layer = None if bias is None else output_layer(adapter, len(bias))
    if layer is not None and layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.tensor(bias, device="cpu"))
    return prepared


def finish_head(trainer: Trainer, prepared: Prepared) -> Prepared:
    """Let the trained head answer in the units of the rows, and return the run with the task for that.

    Args:
        trainer: The trainer, whose adapter has the state that is saved.
        prepared: The run as `start_head` returned it.
    """
    task = prepared.task
    if not isinstance(task, Regression):
        return prepared
    layer = output_layer(trainer.adapter, 1)
    assert layer is not None
    layer.restore_units(*task.scale)
    task = task.scaled(0.0, 1.0)
    trainer.evaluate.task = task
    trainer.evaluations.best_predictions = None  # of the other units: they differ in the last bit
    # bfloat16 has two to three digits: it does for standardised numbers, not for those far from 0.
    trainer.evaluate.dtype, trainer.evaluate.serve = torch.float32, None
    return replace(prepared, task=task)


def refuse_checkpoint(prepared: Prepared) -> None:
    """Raise for a warm start from a checkpoint if its head answers in other units than a finished adapter's.

    Raises:
        ConfigError: The task is one that learns standardised numbers.
    """
    if isinstance(prepared.task, Regression):
        raise ConfigError(
            "a checkpoint of a regression holds standardised numbers, whose scale it does not say",
            where="training.warm_start",
            hint="start from a finished run, or from its adapter folder",
        )
