"""Comparison of an exported model with the adapter: probabilities (or scores, or vectors) of the same real rows.

Legend: B rows, T tokens, C classes or entries of the vocabulary, P compared positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.errors import IntegrityError
from graftwerk.evaluation.inference import autocast, batches_of, evaluation_mode, to_device
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.objective import LabelObjective, ScoreObjective
from graftwerk.tasks.similarity import SimilarityObjective
from graftwerk.tasks.token_objective import TokenObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 32
"""Rows that are compared, unless the caller says otherwise."""
POSITIONS = 8
"""Positions of a row that are compared: whole rows of a large vocabulary would fill the memory."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of probabilities that rounding explains, by the type of the exported weights."""
_ROWS_AT_ONCE = {True: 4, False: 16}
"""Rows of a forward pass, by whether the model makes logits for every token."""


@dataclass(frozen=True)
class Parity:
    """Difference between two models' answers to the same rows.

    Attributes:
        rows: Number of rows compared.
        positions: Number of answers compared: one a row for classes and scores, several for text and tags.
        max_abs_difference: Largest difference of two probabilities; of numbers beyond 1, relative to the largest.
        agreement: Share of the answers with the same most likely entry, 0 to 1; of numbers, of those that are as near
            as the tolerance.
        tolerance: Largest difference that is accepted.
    """

    rows: int
    positions: int
    max_abs_difference: float
    agreement: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Return True if the difference is within the tolerance; NaN is not."""
        return self.max_abs_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@torch.inference_mode()
def probabilities(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return a model's probabilities for each row, (P, C) float32 on the CPU; of other tasks its scores or vector.

    Args:
        model: A model of transformers, with or without adapters, or PEFT's around one.
        task: The task, which collates the rows.
        examples: Encoded rows. Of text, positions that predict a known answer are compared, else those of the input.
        tokenizer: The model's tokenizer.
        dtype: Compute type; anything but float32 means autocast.
    """
    found: list[Tensor] = [torch.empty(0, device="cpu")] * len(examples)
    textual = isinstance(task.objective, TokenObjective)
    with evaluation_mode(model), autocast(model, dtype):
        for rows in batches_of(examples, _ROWS_AT_ONCE[textual]):
            batch = to_device(task.collator.collate([examples[row] for row in rows], tokenizer), model)
            answers = _values(model, task, batch)  # (B, width)
            if answers is not None:
                for place, row in enumerate(rows):
                    found[row] = answers[place][None].float().cpu()
                continue
            logits = _logits(model, task, batch)  # (B, C), or (B, T, C)
            wanted = _positions(task, batch, logits)  # (B, T)
            for place, row in enumerate(rows):
                chosen = logits[place][None] if wanted is None else logits[place][_spread(wanted[place])]
                found[row] = chosen.float().softmax(-1).cpu()  # (P, C)
    return found


def _values(model: PreTrainedModel, task: Task, batch: dict[str, Tensor]) -> Tensor | None:
    """Return a row's answer where it is no distribution: probabilities of labels, a score, a vector; else None."""
    objective = task.objective
    if isinstance(objective, LabelObjective):
        return objective.per_row_outputs(objective.forward(model, batch), batch).sigmoid()
    if isinstance(objective, ScoreObjective | SimilarityObjective):
        return objective.per_row_outputs(objective.forward(model, batch), batch)
    return None


def compare(reference: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> Parity:
    """Compare two models' probabilities of the same rows.

    Args:
        reference: The adapter's, (P, C) for each row.
        other: The exported model's, of the same shapes.
        tolerance: Largest difference that is accepted.

    Raises:
        IntegrityError: The two have another number of classes, tokens or positions.
    """
    for row, (one, two) in enumerate(zip(reference, other, strict=True), start=1):
        if one.shape != two.shape:
            raise IntegrityError(
                f"the exported model answers row {row} with {tuple(two.shape)} probabilities, "
                f"the adapter with {tuple(one.shape)}"
            )
    one, two = torch.cat(list(reference)), torch.cat(list(other))
    apart = (one - two).abs() / max(1.0, float(one.abs().max()))  # (n, C)
    alike = one.argmax(-1) == two.argmax(-1) if one.shape[-1] > 1 else apart[:, 0] <= tolerance
    return Parity(
        rows=len(reference),
        positions=len(one),
        max_abs_difference=float(apart.max()),
        agreement=float(alike.double().mean()),
        tolerance=tolerance,
    )


def require(parity: Parity, what: str) -> Parity:
    """Return the comparison if it holds.

    Raises:
        IntegrityError: The answers differ by more than the tolerance; nothing should be handed over.
    """
    if parity.holds:
        return parity
    raise IntegrityError(
        f"{what} does not answer as the adapter does: probabilities differ by up to {parity.max_abs_difference:.2g} on "
        f"{parity.rows} rows ({100 * parity.agreement:.1f} % of the likeliest answers agree), so it is not written",
        hint=f"up to {parity.tolerance:g} is taken for rounding; --dtype float32 rounds least, and --max-difference "
        f"accepts more",
    )


def _logits(model: PreTrainedModel, task: Task, batch: dict[str, Tensor]) -> Tensor:
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    tokens = inputs["input_ids"].shape[1]
    objective = task.objective
    if isinstance(objective, TokenObjective):
        inputs |= objective.decoder_inputs(_plain(model), inputs, batch.get("labels"))
        tokens = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    logits: Tensor = model(**inputs).logits
    # PEFT leaves the positions of virtual tokens in front
    return logits if logits.ndim < 3 else logits[:, -tokens:]


def _plain(model: PreTrainedModel) -> Any:
    """Return the model of transformers inside of PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _positions(task: Task, batch: dict[str, Tensor], logits: Tensor) -> Tensor | None:
    """Return the mask of the positions to compare, (B, T) bool, or None if a row has one distribution."""
    if logits.ndim < 3:
        return None
    objective, labels = task.objective, batch.get("labels")
    if isinstance(objective, TokenObjective) and labels is not None:
        return objective.predicting(labels).cpu()
    if logits.shape[1] == batch["input_ids"].shape[1] and "attention_mask" in batch:
        return batch["attention_mask"].bool().cpu()
    return torch.ones(logits.shape[:2], dtype=torch.bool, device="cpu")


def _spread(mask: Tensor) -> Tensor:
    """Return at most `POSITIONS` indices of True in a mask (T,), evenly spaced, (P,)."""
    places = mask.nonzero().flatten()
    if len(places) <= POSITIONS:
        return places
    return places[torch.linspace(0, len(places) - 1, POSITIONS, device="cpu").long()]
