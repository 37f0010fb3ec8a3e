"""The loss over the words of a row, and the tags that are answered.

Legend: B rows, T tokens, C tags, n windows, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.tasks.decoder import Decoder
from graftwerk.tasks.example import IGNORED, Example
from graftwerk.tasks.objective import Objective
from graftwerk.tasks.predictions import Predictions
from graftwerk.tasks.tag_predictions import NOBODY, UNREAD, TagPredictions
from graftwerk.tasks.windows import NOWHERE


class TagObjective(Objective):
    """Cross-entropy over the tags of the words; all instances are alike."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over the words, ``logits`` (B, T, C) and ``labels`` (B, T), `IGNORED` where no word is."""
        logits, labels = outputs.logits.float().flatten(0, 1), batch["labels"].flatten()  # (B T, C), (B T,)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of words with a tag in ``labels`` (B, T)."""
        return int((batch["labels"] != IGNORED).sum())

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the likeliest tag of each token and its probability, (B, 2T)."""
        logits = outputs.logits.detach().cpu().double()  # (B, T, C)
        certain, tags = logits.softmax(-1).max(-1)  # (B, T)
        return torch.cat([tags.double(), certain], dim=1)


@dataclass(frozen=True)
class TagDecoder(Decoder):
    """Tags of words from those of tokens.

    Attributes:
        labels: Names of the tags in the order of their ids.
    """

    labels: tuple[str, ...]

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> TagPredictions:
        """Return the tags of the words of all n windows, whose outputs are tags and probabilities, (1, 2T) each."""
        places = [example.row or {"row": at, "at": []} for at, example in enumerate(examples)]
        shape = (len(examples), max((len(place["at"]) for place in places), default=0))
        tags, certain = np.full(shape, NOBODY, dtype=np.int64), np.zeros(shape)  # (n, W)
        targets = tags.copy() if examples and all("gold" in place for place in places) else None
        for number, (row, place) in enumerate(zip(outputs, places, strict=True)):
            values, words = row[0].numpy().reshape(2, -1), len(place["at"])  # (2, T)
            at = np.array(place["at"], dtype=np.int64)
            tags[number, :words] = np.where(at == NOWHERE, UNREAD, values[0, at].astype(np.int64))
            certain[number, :words] = np.where(at == NOWHERE, 1.0, values[1, at])
            if targets is not None:
                targets[number, :words] = place["gold"]
        ids = np.array([place["row"] for place in places], dtype=np.int64)
        return TagPredictions(loss, tags, targets, certain, ids, self.labels)

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, TagPredictions)
        return [
            {"tags": list(tags), "scores": scores}
            for tags, scores in zip(predictions.tag_names, predictions.certainties, strict=True)
        ]
