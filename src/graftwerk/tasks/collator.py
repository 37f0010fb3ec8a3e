"""Collating: examples become the padded tensors of one batch.

Legend: B examples, T tokens of the longest input, A tokens of the longest target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graftwerk.tasks.example import IGNORED, Example
from graftwerk.tasks.tokenization import pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator(ABC):
    """Pad examples to the longest of a batch."""

    redraws: ClassVar[bool] = False
    """True if the training batch of the same examples differs from call to call."""

    several: ClassVar[bool] = False
    """True if an example is several rows of the batch."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the batch of some examples for evaluation.

        Args:
            examples: At least one.
            tokenizer: The tokenizer that encoded them; it names the padding token.

        Returns:
            ``input_ids``, ``attention_mask`` and the like, each (B, T); ``labels`` if all examples have a target.
        """

    def collate_training(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the batch of some examples for a training step, as `collate` if not `redraws`.

        Random choices come from torch's global generator, whose state is part of a checkpoint.

        Returns:
            As `collate`: ``input_ids`` and the like, each (B, T), and ``labels``.
        """
        return self.collate(examples, tokenizer)


@dataclass(frozen=True)
class ClassCollator(Collator):
    """Texts with one class id each: ``labels`` (B,)."""

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        return _with_targets(examples, tokenizer, torch.long)


@dataclass(frozen=True)
class TextCollator(Collator):
    """Texts with target tokens, padded on the right: ``labels`` (B, A), filled up with `IGNORED`."""

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        batch = pad([example.inputs for example in examples], tokenizer)
        if all(example.target is not None for example in examples):
            width = max(len(example.target) for example in examples)
            batch["labels"] = torch.full((len(examples), width), IGNORED, dtype=torch.long, device="cpu")
            for row, example in enumerate(examples):
                batch["labels"][row, : len(example.target)] = torch.tensor(
                    example.target, dtype=torch.long, device="cpu"
                )
        return batch


@dataclass(frozen=True)
class ScoreCollator(Collator):
    """Texts with one number each: ``labels`` (B,)."""

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        # Doubles: a large number would be rounded before the mean is taken away.
        return _with_targets(examples, tokenizer, torch.float64)


@dataclass(frozen=True)
class LabelCollator(Collator):
    """Texts with several labels each: ``labels`` (B, L) of 0 and 1."""

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        return _with_targets(examples, tokenizer, torch.float32)


def _with_targets(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return padded examples with their targets as ``labels`` (B,) or (B, L), or without if one has none."""
    batch = pad([example.inputs for example in examples], tokenizer)
    if all(example.target is not None for example in examples):
        batch["labels"] = torch.tensor([example.target for example in examples], dtype=dtype, device="cpu")
    return batch
