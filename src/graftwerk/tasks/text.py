"""What all tasks have in common in which a model writes text: the loss on marked tokens, likelihoods, prompts.

Two layouts. A *causal* model reads prompt and answer in one row; ``labels`` repeat the row's tokens where they are to
be learnt and are -100 elsewhere, and position t predicts label t + 1. An *encoder-decoder* reads the source; its
decoder predicts ``labels``, which the model itself shifts to the right. In both, the vocabulary head runs only where a
label is: of a prompt of 300 tokens and an answer of 5, five rows of logits are made and not 305; and of these no more
than a tile at a time (`block_loss`), where the model's head is understood (`before_head`).

Legend: B rows, T tokens, N labelled tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import read_splits
from graftwerk.data.stream import read_stream
from graftwerk.errors import UnsupportedError
from graftwerk.kernels import flags as fast
from graftwerk.kernels.lm_head import LabelledLogits, labelled_tokens
from graftwerk.tasks.base import Example, Predictions, Splits, Task, splits_of, splits_of_stream
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.tokenization import pad

IGNORED = -100
"""The label of a token that is not trained."""

Layout = Literal["causal", "encoder-decoder"]


class TextTask(Task):
    """Abstract; subclasses say how rows are read and encoded. `on` must have been called before anything else is."""

    best_metric: ClassVar[str] = "loss"
    head: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    layouts: ClassVar[tuple[Layout, ...]] = ("causal", "encoder-decoder")
    """What kinds of model can do it."""

    _layout: Layout = PrivateAttr(default="causal")

    def for_model(self, architecture: Any) -> Self:
        layout: Layout = "encoder-decoder" if getattr(architecture, "is_encoder_decoder", False) else "causal"
        if layout not in self.layouts:
            raise UnsupportedError(
                f"{self.title} needs a {' or '.join(self.layouts)} model, and `{architecture.model_type}` is none",
                where="task",
            )
        bound = self.model_copy()
        bound._layout = layout
        return bound

    @property
    def seq2seq(self) -> Layout:
        return self._layout

    @property
    def packs(self) -> bool:
        return self._layout == "causal"

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        if data.streaming:
            return splits_of_stream(data, read_stream(data, self.row_format, self.parts), self.parts)
        chosen, findings = read_splits(data, self.row_format)
        return splits_of(data, chosen, findings, self.parts)

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {}

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        return AutoModelForCausalLM if self._layout == "causal" else AutoModelForSeq2SeqLM

    # -- training --------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, T), padded on the right; `labels` (B, T or the longest answer) if all rows
        have a target.
        """
        batch = pad([example.inputs for example in examples], tokenizer)
        if all(example.target is not None for example in examples):
            width = max(len(example.target) for example in examples)
            batch["labels"] = torch.full((len(examples), width), IGNORED, dtype=torch.long)
            for row, example in enumerate(examples):
                batch["labels"][row, : len(example.target)] = torch.tensor(example.target, dtype=torch.long)
        return batch

    def forward(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """What `loss` and `respond` take: the labelled tokens before the head, or outputs with ``logits`` (N, V)."""
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch.get("labels")
        if labels is None:
            return self._unanswered(model, inputs)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            inputs["use_cache"] = False  # rows packed into one: with a cache, transformers does not look for them
        plain = getattr(model, "module", model)
        if self._layout == "encoder-decoder":
            inputs["decoder_input_ids"] = _shifted(plain, labels)
        mask = self._predicting(labels)
        if fast.enabled("loss") and (labelled := labelled_tokens(model, inputs, mask)) is not None:
            return labelled
        if _keeps_logits(type(plain)):
            return model(**inputs, logits_to_keep=mask)
        outputs = model(**inputs)
        outputs.logits = outputs.logits[mask]
        return outputs

    def _unanswered(self, model: Any, inputs: dict[str, Any]) -> Any:
        """A pass over rows without an answer, whose logits nobody compares: as few as a model makes."""
        plain = getattr(model, "module", model)
        if self._layout == "encoder-decoder":
            ids = inputs["input_ids"]
            start = getattr(plain.config, "decoder_start_token_id", None)
            first = ids[:, :1] if start is None else torch.full_like(ids[:, :1], start)
            return model(**inputs, decoder_input_ids=first)
        return model(**inputs, logits_to_keep=1) if _keeps_logits(type(plain)) else model(**inputs)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over the labelled tokens of the batch, in float32; 0 where no token is labelled."""
        wanted = self._wanted(batch["labels"])
        if isinstance(outputs, LabelledLogits):
            return outputs.loss(wanted, label_smoothing)
        if not len(wanted):
            return torch.as_tensor(outputs.logits).float().sum()  # nothing, but connected to the parameters
        return F.cross_entropy(outputs.logits.float(), wanted, label_smoothing=label_smoothing)

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        return int(self._predicting(batch["labels"]).sum())

    def _predicting(self, labels: Tensor) -> Tensor:
        """(B, T) bool: positions whose output is compared with a label."""
        if self._layout == "encoder-decoder":
            return labels != IGNORED
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != IGNORED
        return mask

    def _wanted(self, labels: Tensor) -> Tensor:
        """(N,): the labels, in the order of the logits."""
        if self._layout == "causal":
            labels = labels[:, 1:]
        return labels[labels != IGNORED]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, 2): the summed negative log-likelihood of a row's labels in nats, and how many there are."""
        rows = batch["input_ids"].shape[0]
        if "labels" not in batch:
            return torch.zeros(rows, 2, dtype=torch.float64)
        mask, wanted = self._predicting(batch["labels"]), self._wanted(batch["labels"])
        if isinstance(outputs, LabelledLogits):
            each = outputs.nll(wanted).double()
        else:
            each = F.cross_entropy(outputs.logits.float(), wanted, reduction="none").double()
        row = torch.arange(rows, device=mask.device)[:, None].expand_as(mask)[mask]
        summed = torch.zeros(rows, dtype=torch.float64, device=mask.device).index_add_(0, row, each)
        return torch.stack([summed, mask.sum(dim=1).double()], dim=1).cpu()

    def predictions(
        self, kept: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> TextPredictions:
        together = torch.cat(list(kept)).numpy() if len(kept) else np.zeros((0, 2))
        references = [self.reference(example) for example in examples]
        sources = [self.source(example) for example in examples]
        languages = tuple(self.language(example) or "" for example in examples)
        return TextPredictions(
            loss,
            together[:, 0],
            together[:, 1].astype(np.int64),
            texts=None if texts is None else tuple(texts),
            references=_all_known(references),
            sources=_all_known(sources),
            languages=languages if any(languages) else None,
        )

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, TextPredictions)
        return [{"output": text} for text in predictions.texts or ()]

    def reference(self, example: Example) -> str | None:
        """The right answer, as it is compared with a generated one."""
        return None

    def source(self, example: Example) -> str | None:
        """What the answer is made from, for people who read the table."""
        return None

    def language(self, example: Example) -> str | None:
        """ISO code of the language of the right answer, for metrics that look for words; None: not known."""
        return None

    # -- generation ------------------------------------------------------------------------------------------------

    def collate_prompts(self, prompts: Sequence[list[int]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the left for causal models, which go on where a prompt ends; on the right for encoders."""
        batch = pad([{"input_ids": prompt} for prompt in prompts], tokenizer)
        if self._layout == "causal":
            width = batch["input_ids"].shape[1]
            for row, prompt in enumerate(prompts):
                for tensor in batch.values():
                    tensor[row] = tensor[row].roll(width - len(prompt))
        return batch

    def generation_group(self, example: Example) -> Any:
        """Only rows with the same (hashable) value are answered in one batch: their `generation_options` are alike."""
        return None

    def generation_options(self, model: Any, tokenizer: Any, example: Example) -> dict[str, Any]:
        """What `generate` is told beside the search itself."""
        return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}

    def new_tokens(self, written: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What was written, without the prompt."""
        return written[:, batch["input_ids"].shape[1] :] if self._layout == "causal" else written

    def decode(self, tokens: Sequence[int], tokenizer: Any) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """(B, T): what a decoder reads to predict ``labels``: the start token, and the labels but the last."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    # M2M100 and NLLB shift inside `forward`, which would then compute the loss too
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def _keeps_logits(model: Any) -> bool:
    """Whether a class of models can be told at which positions the vocabulary head is wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _all_known(values: Sequence[str | None]) -> tuple[str, ...] | None:
    return tuple(map(str, values)) if values and all(value is not None for value in values) else None
