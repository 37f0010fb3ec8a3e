"""Similarity: texts become vectors, and texts that belong together lie close to each other.

A vector is the mean of a model's last hidden states over the tokens of a text, at length one; similarity is the cosine.
Rows are pairs with a score, learnt by their order (CoSENT: Su, "CoSENT: more effective sentence vectors", 2022), or
anchors with a text that belongs to each and perhaps some that do not, learnt against all other texts of a forward pass
(in-batch negatives: Henderson et al., "Efficient Natural Language Response Suggestion", arXiv:1705.00652).

Legend: B rows, K hard negatives of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.data.fields import number_part, text_part, texts_part
from graftwerk.data.settings import DataSettings, source_name
from graftwerk.data.splits_reader import RowFormat, read_splits
from graftwerk.data.stream import read_stream
from graftwerk.errors import DataError, UnsupportedError
from graftwerk.tasks.base import Task
from graftwerk.tasks.collator import Collator
from graftwerk.tasks.decoder import Decoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.example_checks import special_notes, special_words
from graftwerk.tasks.objective import Objective
from graftwerk.tasks.predictions import Predictions
from graftwerk.tasks.splits import Splits, splits_of, splits_of_stream
from graftwerk.tasks.tokenization import encode_texts, pad
from graftwerk.tasks.vector_predictions import SimilarityPredictions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BOTH = {"scores": ("text", "text_pair"), "anchors": ("anchor", "positive")}
"""The fields of the two texts of a row, by the kind of rows."""


class Similarity(Task):
    """Vectors of texts."""

    name = "similarity"
    title = "Similarity"
    fields = ("text", "text_pair", "score", "anchor", "positive", "negative")
    metrics = ("spearman", "pearson", "recall_at_10", "recall_at_1", "reciprocal_rank")
    has_head = False
    label_smoothing = False

    rows: Literal["auto", "scores", "anchors"] = Field(
        default="auto",
        description="scores: pairs `text` and `text_pair` with a `score`; anchors: `anchor`, `positive`, perhaps "
        "`negative`; auto: inferred from the columns",
    )
    scale: float = Field(
        default=20.0, gt=0, description="factor on the cosines in the loss; larger: only near texts count"
    )

    @property
    def main_metric(self) -> str:
        """Return Spearman for scores, recall at 10 for anchors."""
        return "recall_at_10" if self.rows == "anchors" else "spearman"

    @property
    def best_metric(self) -> str:  # type: ignore[override]
        """Return the metric that decides, which also chooses the checkpoint."""
        return self.main_metric

    def for_model(self, config: PreTrainedConfig) -> Self:
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"similarity needs an encoder or a decoder, and `{config.model_type}` is both",
                where="task",
                hint="use an encoder: MiniLM, BERT, ModernBERT",
            )
        return self

    def resolved(self, splits: Splits) -> Self:
        """Return the task that knows what its rows are."""
        first = next(iter(splits.train), None)
        if first is None or self.rows != "auto":
            return self
        return self.model_copy(update={"rows": "anchors" if "anchor" in first else "scores"})

    # -- rows ------------------------------------------------------------------------------------------------------

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        if self.rows == "anchors" or (self.rows == "auto" and "anchor" in columns):
            return RowFormat(
                {"anchor": text_part, "positive": text_part}, key=_key, optional={"negative": texts_part}
            )  # fmt: skip
        return RowFormat(
            {"text": text_part, "text_pair": text_part, "score": number_part}, key=_key, answers=("score",)
        )  # fmt: skip

    def example_from_text(self, text: str) -> Row:
        """Return a row of one text, whose vector is the answer, or of two with a tab between them."""
        first, tab, second = text.partition("\t")
        return {"text": first, "text_pair": second} if tab and first.strip() and second.strip() else {"text": text}

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        source = source_name(data.source)
        if data.streaming:
            streamed = read_stream(data, self.row_format, self.fields)
            _check(streamed.rows, {split: part.rows for split, part in streamed.held.items()}, source)
            return splits_of_stream(data, streamed, self.fields)
        chosen, findings = read_splits(data, self.row_format)
        _check(chosen["train"].rows, {split: part.rows for split, part in chosen.items()}, source)
        return splits_of(data, chosen, findings, self.fields)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Encode the texts of each row, each by itself and of at most ``max_length`` tokens.

        Raises:
            DataError: Some rows are pairs and others single texts.
        """
        texts = [texts_of(row) for row in rows]
        if len({len(each) > 1 for each in texts}) > 1:
            raise DataError("some rows are pairs of texts and others are single ones", hint="ask for them apart")
        flat = iter(encode_texts([text for each in texts for text in each], tokenizer, max_length))
        special = special_words(tokenizer)
        examples = []
        for row, each in zip(rows, texts, strict=True):
            (inputs, lost), *others = [next(flat) for _ in each]
            target = 0 if "anchor" in row else row.get("score")
            examples.append(
                Example(
                    inputs,
                    target,
                    lost + sum(more for _, more in others),
                    row={"others": [other for other, _ in others]},
                    notes=special_notes(each, special),
                )
            )
        return examples

    def labels_in(self, row: Row) -> Sequence[str]:
        return ()

    def target_text(self, target: Any, labels: Sequence[str] | None) -> str | None:
        if target is None:
            return None
        return f"{target:g}" if isinstance(target, float) else "its positive"

    # -- model -----------------------------------------------------------------------------------------------------

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {}

    def auto_class(self) -> Any:
        from transformers import AutoModel

        return AutoModel

    @property
    def collator(self) -> Collator:
        return PairCollator()

    @property
    def objective(self) -> Objective:
        return SimilarityObjective(self.scale)

    @property
    def decoder(self) -> Decoder:
        return SimilarityDecoder()


@dataclass(frozen=True)
class PairCollator(Collator):
    """The texts of all rows in one batch: the first of each row, then the second ones, then the hard negatives."""

    several = True

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the batch of some examples, all pairs or all single texts.

        Returns:
            ``input_ids`` and the like, each (2 B + K, T), or (B, T) for single texts; ``rows``, a scalar: B; ``labels``
            (B,) if all examples have a target: scores as floats, or zeros as integers.
        """
        others = [(example.row or {}).get("others", []) for example in examples]
        second = [each[0] for each in others if each]
        batch = pad(
            [*(example.inputs for example in examples), *second, *(text for each in others for text in each[1:])],
            tokenizer,
        )
        batch["rows"] = torch.tensor(len(examples), device="cpu")
        targets = [example.target for example in examples]
        if second and all(target is not None for target in targets):
            kind = torch.long if isinstance(targets[0], int) else torch.float64
            batch["labels"] = torch.tensor(targets, dtype=kind, device="cpu")
        return batch


@dataclass(frozen=True)
class SimilarityObjective(Objective):
    """The losses over cosines.

    Attributes:
        scale: Factor on the cosines.
    """

    scale: float = 20.0

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's outputs for all texts of a batch.

        Args:
            model: The model, perhaps wrapped for several processes.
            batch: As `PairCollator` makes it; tensors of (N, T), for N = 2 B + K.
        """
        return model(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "rows")})

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return CoSENT's loss for scores, the cross-entropy over the other texts of the batch for anchors.

        ``last_hidden_state`` is (2 B + K, T, D), ``labels`` (B,); `check_settings` refuses a label smoothing.
        """
        vectors, rows = vectors_of(outputs, batch), int(batch["rows"])  # (2 B + K, D)
        first, candidates = vectors[:rows], vectors[rows:]
        if batch["labels"].is_floating_point():
            return self._of_scores((first * candidates[:rows]).sum(-1), batch["labels"])
        scores = self.scale * first @ candidates.T  # (B, B + K)
        ids = batch["input_ids"][rows:]
        same = (ids[:rows, None] == ids[None]).all(-1)  # (B, B + K): the same text again is no wrong answer
        same.fill_diagonal_(False)
        right = torch.arange(rows, device=scores.device)
        return F.cross_entropy(scores.masked_fill(same, float("-inf")), right)

    def _of_scores(self, cosines: Tensor, scores: Tensor) -> Tensor:
        """Return log(1 + sum of exp(scale (cos_i - cos_j)) over the pairs in which row j has the higher score)."""
        apart = self.scale * (cosines[:, None] - cosines[None])  # (B, B)
        wrong = apart[scores[:, None] < scores[None]]
        return torch.cat([apart.new_zeros(1), wrong]).logsumexp(0)

    def num_targets(self, batch: Mapping[str, Tensor]) -> float:
        """Return the number of rows of ``labels`` (B,)."""
        return batch["labels"].numel()

    def per_row_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of both texts of each row, (B, 2D), or of single texts, (B, D)."""
        vectors, rows = vectors_of(outputs, batch).detach().cpu(), int(batch["rows"])
        return torch.cat([vectors[:rows], vectors[rows : 2 * rows]], dim=1) if len(vectors) > rows else vectors


def vectors_of(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the hidden states over the tokens of each text, at length one.

    Args:
        outputs: Outputs with ``last_hidden_state`` (N, T, D).
        batch: The batch with ``attention_mask`` (N, T).

    Returns:
        (N, D), float32.
    """
    mask = batch["attention_mask"][..., None].float()  # (N, T, 1)
    sums = (outputs.last_hidden_state.float() * mask).sum(1)
    return F.normalize(sums / mask.sum(1).clamp_min(1e-9), dim=-1)


@dataclass(frozen=True)
class SimilarityDecoder(Decoder):
    """Cosines of pairs, or vectors of single texts."""

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> SimilarityPredictions:
        vectors = torch.cat(list(outputs)).numpy() if len(outputs) else np.zeros((0, 0), dtype=np.float32)
        pairs = any((example.row or {}).get("others") for example in examples)
        width = vectors.shape[1] // 2 if pairs else vectors.shape[1]
        targets = [example.target for example in examples]
        scored = bool(targets) and all(isinstance(target, float) for target in targets)
        return SimilarityPredictions(
            loss,
            vectors[:, :width],
            vectors[:, width:] if pairs else None,
            np.array(targets, dtype=np.float64) if scored else None,
        )

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        assert isinstance(predictions, SimilarityPredictions)
        if predictions.others is None:
            return [{"embedding": vector} for vector in predictions.anchors.tolist()]
        return [{"similarity": float(value)} for value in predictions.values]


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row: the first, the one that it is compared with, and those that do not belong to it."""
    first, second = BOTH["anchors" if "anchor" in row else "scores"]
    return [row[first], *([row[second]] if second in row else []), *row.get("negative", [])]


def _key(row: Mapping[str, Any]) -> str:
    return "\n".join(texts_of({part: value for part, value in row.items() if part != "negative"}))


def _check(train: Iterable[Row], held: Mapping[str, Sequence[Row]], source: str) -> None:
    """Raise DataError if nothing can be learnt from the training rows, or the held-out ones are of the other kind."""
    scores: set[float] = set()
    kinds: set[str] = set()
    for row in train:
        kinds.add("anchors" if "anchor" in row else "scores")
        if len(scores) < 2 and "score" in row:
            scores.add(row["score"])
    if kinds == {"scores"} and len(scores) < 2:
        raise DataError(
            f"all training rows of {source} have the score {next(iter(scores))}; there is nothing to learn",
            hint="check `data.columns.score`; texts that belong together need none: columns `anchor` and `positive`",
        )
    others = {"anchors" if "anchor" in row else "scores" for part in held.values() for row in part}
    if others - kinds:
        raise DataError(
            f"the training rows of {source} are {next(iter(kinds))} and held-out rows {next(iter(others - kinds))}",
            where="data.columns",
            hint="give both the same columns",
        )
