"""The training objective: a batch through the model, and the loss of its outputs.

The loss is computed here and not by the model, whose outputs are therefore asked for without labels.

Legend: B rows, C classes, L labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.kernels.first_token import first_token_alone

CLASS_WEIGHTS, POSITIONS, WORDS = "class_weights", "label_positions", "label_words"
"""Entries that `Objective.prepare` adds to a batch."""
OF_LOSS = frozenset(("labels", CLASS_WEIGHTS, POSITIONS, WORDS))
"""Entries of a batch that are not passed to the model."""


class Objective(ABC):
    """Forward pass and loss of a batch, and the part of the outputs that predictions are made from."""

    def prepare(self, batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return a collated batch with what the loss has to know of its labels.

        Found on the host, before the batch moves: read from the device's labels, each fact would be a wait for the
        device in every step. A batch that was not prepared is as good, and slower there.

        Args:
            batch: As the collator made it, ``labels`` of any shape.
            model: The model, perhaps wrapped for several processes.

        Raises:
            ModelError: A label is none of the model's words.
        """
        return dict(batch)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's outputs for a batch.

        Args:
            model: The model, perhaps wrapped for several processes.
            batch: ``input_ids`` and the like, each (B, T); ``labels`` are not passed to the model.
        """
        return model(**{name: tensor for name, tensor in batch.items() if name not in OF_LOSS})

    def narrowed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context for `forward` and backward passes in which layers compute no more than the loss reads.

        Args:
            model: The model, perhaps wrapped for several processes.
        """
        return nullcontext()

    @abstractmethod
    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean loss over the targets of a batch.

        Args:
            outputs: The result of `forward`.
            batch: The batch with ``labels``.
            label_smoothing: Probability mass spread over all classes, 0 to 1.

        Returns:
            A float32 scalar in nats, whatever type the model computes in.
        """

    @abstractmethod
    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of targets that `loss` averages over, or their total weight; it weights micro-batches.

        Args:
            batch: The batch, with ``labels`` of any shape.
        """

    @abstractmethod
    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the part of the outputs that predictions are made from, (B, width) on the CPU.

        Args:
            outputs: The result of `forward`.
            batch: The batch; ``labels`` may be missing.
        """


class RowObjective(Objective):
    """Forward pass of models whose head gives one answer for a row, (B, C) logits."""

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's outputs for a batch of (B, T) tokens; hidden states among them may be of one token."""
        with first_token_alone(model):
            return super().forward(model, batch)

    def narrowed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a model whose head reads the first token alone ends its last layer there."""
        return first_token_alone(model, backward=True)


@dataclass(frozen=True, eq=False)
class ClassObjective(RowObjective):
    """Cross-entropy over the classes of a row.

    Attributes:
        class_weights: (C,) weight of each class in the loss, or None if all count alike.
    """

    class_weights: Tensor | None = None

    def prepare(self, batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the batch, ``labels`` (B,), with the class weights (C,), so that they move with it."""
        return dict(batch) if self.class_weights is None else {**batch, CLASS_WEIGHTS: self.class_weights}

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over the rows, or with class weights torch's weighted mean.

        ``logits`` are (B, C), ``labels`` (B,).
        """
        weights = batch.get(CLASS_WEIGHTS, self.class_weights)
        weights = None if weights is None else weights.to(outputs.logits.device)
        return F.cross_entropy(outputs.logits.float(), batch["labels"], weight=weights, label_smoothing=label_smoothing)

    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of rows of ``labels`` (B,), or with class weights the sum of their weights."""
        labels = batch["labels"]
        return labels.numel() if self.class_weights is None else float(self.class_weights[labels.cpu()].sum())

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits, (B, C)."""
        logits: Tensor = outputs.logits.detach().float().cpu()
        return logits


@dataclass(frozen=True)
class ScoreObjective(RowObjective):
    """Mean squared error of standardised numbers.

    Attributes:
        mean: Number that the model's output 0 stands for.
        deviation: Difference that one unit of the model's output stands for.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over the rows of ``(output - (y - mean) / deviation) ** 2``, a scalar.

        ``logits`` are (B, 1), ``labels`` (B,); `check_settings` refuses a label smoothing.
        """
        targets = ((batch["labels"] - self.mean) / self.deviation).float()  # (B,)
        return F.mse_loss(outputs.logits.float().squeeze(-1), targets)

    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of rows of ``labels`` (B,)."""
        return batch["labels"].numel()

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers in the units of the rows, (B, 1)."""
        logits: Tensor = outputs.logits.detach().cpu().double()
        return logits * self.deviation + self.mean


@dataclass(frozen=True)
class LabelObjective(RowObjective):
    """Binary cross-entropy of each label."""

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over rows and labels, ``logits`` (B, L) and ``labels`` (B, L) of 0 and 1.

        `check_settings` refuses a label smoothing.
        """
        return F.binary_cross_entropy_with_logits(outputs.logits.float(), batch["labels"])

    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of rows of ``labels`` (B, L)."""
        return batch["labels"].shape[0]

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits, (B, L)."""
        logits: Tensor = outputs.logits.detach().float().cpu()
        return logits
