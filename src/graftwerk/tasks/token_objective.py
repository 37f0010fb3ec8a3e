"""Cross-entropy over labelled tokens, for every kind of model that predicts tokens.

The vocabulary head runs only on positions that are compared with a label: of a prompt of 300 tokens and an answer of 5,
five rows of logits are made and not 305; and of these no more than a tile at a time (`kernels.chunked_cross_entropy`)
if the model's head is known (`kernels.lm_head`).

Legend: B rows, T tokens, N labelled tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.kernels import flags
from graftwerk.kernels.chunked_cross_entropy import check_labels
from graftwerk.kernels.lm_head import LabelledLogits, labelled_tokens
from graftwerk.tasks.example import IGNORED
from graftwerk.tasks.objective import OF_LOSS, POSITIONS, WORDS, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenObjective(Objective):
    """Mean cross-entropy over the labelled tokens; subclasses say which position predicts which label."""

    @abstractmethod
    def predicting(self, labels: Tensor) -> Tensor:
        """Return the mask of the positions whose output is compared with a label, (B, T) bool.

        Args:
            labels: (B, T), `IGNORED` for tokens that are not trained.
        """

    def expected(self, labels: Tensor) -> Tensor:
        """Return the labels in the order of the logits, (N,)."""
        return labels[labels != IGNORED]

    def prepare(self, batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the batch, ``labels`` (B, T), with the places (N,) of the labelled tokens and their labels (N,)."""
        if "labels" not in batch:
            return dict(batch)
        positions, expected = self._labelled(batch)
        plain: Any = getattr(model, "module", model)
        head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
        if isinstance(words := getattr(head, "out_features", None), int):
            check_labels(expected, words)
        return {**batch, POSITIONS: positions, WORDS: expected}

    def _labelled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the places of the outputs that are compared, among B T, and the labels in their order; (N,) each."""
        if WORDS in batch:
            return batch[POSITIONS], batch[WORDS]
        labels = batch["labels"]
        return self.predicting(labels).flatten().nonzero()[:, 0], self.expected(labels)

    def decoder_inputs(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], labels: Tensor | None
    ) -> dict[str, Any]:
        """Return inputs that the model needs beside those of the batch; most need none.

        Args:
            model: The model without a wrapper for several processes.
            inputs: The inputs of the batch.
            labels: (B, T), or None if no answer is known.
        """
        return {}

    def forward(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
        """Return the labelled tokens before the vocabulary head, or outputs with ``logits`` (N, V).

        Without labels no logits are compared, and the model makes as few as it can.
        """
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in OF_LOSS}
        labels = batch.get("labels")
        plain: Any = getattr(model, "module", model)
        keeps_logits = "logits_to_keep" in inspect.signature(type(plain).forward).parameters
        inputs |= self.decoder_inputs(plain, inputs, labels)
        if labels is None:
            fewest = {"logits_to_keep": 1} if keeps_logits and "decoder_input_ids" not in inputs else {}
            return model(**inputs, **fewest)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            inputs["use_cache"] = False  # rows packed into one: with a cache, transformers does not look for them
        positions, _ = self._labelled(batch)  # (N,)
        if flags.enabled("loss"):
            labelled = labelled_tokens(model, inputs, labels.shape, positions)
            if labelled is not None:
                return labelled
        if keeps_logits:
            return model(**inputs, logits_to_keep=self.predicting(labels))
        outputs = model(**inputs)
        outputs.logits = outputs.logits.flatten(0, 1)[positions]  # (N, V)
        return outputs

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean over the labelled tokens of ``labels`` (B, T), 0 if none is: others are `IGNORED`."""
        _, expected = self._labelled(batch)  # (N,)
        if isinstance(outputs, LabelledLogits):
            return outputs.loss(expected, label_smoothing, checked=WORDS in batch)
        if not len(expected):
            logits: Tensor = outputs.logits
            return logits.float().sum()  # nothing, but connected to the parameters
        return F.cross_entropy(outputs.logits.float(), expected, label_smoothing=label_smoothing)

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of labels in ``labels`` (B, T) that some position predicts."""
        return len(batch[WORDS]) if WORDS in batch else int(self.predicting(batch["labels"]).sum())

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed negative log-likelihood of each row's labels in nats, and their number, (B, 2) float64."""
        rows = batch["input_ids"].shape[0]
        if "labels" not in batch:
            return torch.zeros(rows, 2, dtype=torch.float64, device="cpu")
        mask = self.predicting(batch["labels"])  # (B, T)
        _, expected = self._labelled(batch)  # (N,)
        if isinstance(outputs, LabelledLogits):
            nll = outputs.nll(expected, checked=WORDS in batch)
        else:
            nll = F.cross_entropy(outputs.logits.float(), expected, reduction="none")  # (N,)
        mask, nll = mask.cpu(), nll.detach().cpu().double()  # float64 is not everywhere, and slow where it is
        row = torch.arange(rows, device="cpu")[:, None].expand_as(mask)[mask]  # (N,)
        summed = torch.zeros(rows, dtype=torch.float64, device="cpu").index_add_(0, row, nll)
        return torch.stack([summed, mask.sum(dim=1).double()], dim=1)


@dataclass(frozen=True)
class NextTokenObjective(TokenObjective):
    """Causal models: position t predicts label t + 1, and nothing predicts the first."""

    def predicting(self, labels: Tensor) -> Tensor:
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != IGNORED
        return mask

    def expected(self, labels: Tensor) -> Tensor:
        return super().expected(labels[:, 1:])


@dataclass(frozen=True)
class SameTokenObjective(TokenObjective):
    """Masked encoders: position t predicts label t."""

    def predicting(self, labels: Tensor) -> Tensor:
        return labels != IGNORED


@dataclass(frozen=True)
class Seq2SeqObjective(SameTokenObjective):
    """Encoder-decoder models: the decoder reads the labels shifted to the right, and predicts them."""

    def decoder_inputs(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], labels: Tensor | None
    ) -> dict[str, Any]:
        if labels is not None:
            return {"decoder_input_ids": _shifted(model, labels), "use_cache": False}  # nothing comes after
        start = getattr(model.config, "decoder_start_token_id", None)
        first = inputs["input_ids"][:, :1]
        return {"decoder_input_ids": first if start is None else torch.full_like(first, start)}


def _shifted(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return what a decoder reads to predict the labels: the start token, and the labels but the last, (B, T)."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    # M2M100 and NLLB shift inside `forward`, which would then compute the loss too
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)
