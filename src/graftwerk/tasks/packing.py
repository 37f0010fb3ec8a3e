"""Several rows in one: a micro-batch without padding, in which no row sees another.

Positions begin anew with each row, and no mask is given: from that transformers tells where a row begins, and hides the
others (`find_packed_sequence_indices`); a prefix stands before each of them, a prompt cannot. Whether a model really
does so is tried, not believed: `check_packing` compares a packed with an unpacked pass.

Legend: B packed rows, T their longest, N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftwerk.errors import UnsupportedError
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.example import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-3
"""Largest difference of two logits, against the largest logit; another row seen makes a thousand times more."""
TRIED_TOKENS = 16


def bins(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack rows into bins, longest first, each into the first bin with room; return the indices by bin.

    A row longer than ``max_length`` stands alone.
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = next((at for at, left in enumerate(room) if left >= lengths[row]), None)
        if place is None:
            packed.append([])
            room.append(max_length)
            place = len(packed) - 1
        packed[place].append(row)
        room[place] -= lengths[row]
    return packed


def pack(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Tensor]:
    """Return ``input_ids``, ``position_ids`` and ``labels``, each (B, T) int64, of packed examples.

    Padding at the end is a row of its own that nothing is learnt from.
    """
    groups = bins([example.length for example in examples], max_length)
    width = max(sum(examples[row].length for row in group) for group in groups)
    batch = {
        "input_ids": torch.full((len(groups), width), tokenizer.pad_token_id, dtype=torch.long, device="cpu"),
        "position_ids": torch.zeros(len(groups), width, dtype=torch.long, device="cpu"),
        "labels": torch.full((len(groups), width), IGNORED, dtype=torch.long, device="cpu"),
    }
    for place, group in enumerate(groups):
        at = 0
        for row in group:
            ids, target = examples[row].inputs["input_ids"], examples[row].target
            here = slice(at, at + len(ids))
            batch["input_ids"][place, here] = torch.tensor(ids, device="cpu")
            batch["position_ids"][place, here] = torch.arange(len(ids), device="cpu")
            # A row's first token is predicted by nothing, least of all by the row before it.
            batch["labels"][place, here] = torch.tensor([IGNORED, *target[1:]], device="cpu")
            at += len(ids)
        batch["position_ids"][place, at:] = torch.arange(width - at, device="cpu")
    return batch


@torch.no_grad()
def check_packing(
    model: PreTrainedModel, task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Try on two short rows whether packing changes what the model says.

    Raises:
        UnsupportedError: it does, or what is attached to the model cannot stand before each packed row.
    """
    tried = sorted(examples, key=lambda example: example.length)[:2]
    short = [_every_label(example) for example in (tried if len(tried) == 2 else tried * 2)]
    device = next(iter(model.parameters())).device
    training = model.training
    model.eval()
    try:
        alone = [_logits(model, task, task.collator.collate([example], tokenizer), device) for example in short]
        together = _logits(model, task, pack(short, tokenizer, 2 * TRIED_TOKENS), device)
    finally:
        model.train(training)
    # The longer row is packed first.
    order = sorted(range(2), key=lambda row: (-short[row].length, row))
    expected = torch.cat([alone[row] for row in order])
    difference = float((expected - together).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise UnsupportedError(
            f"{type(model).__name__} lets packed rows see each other (its scores differ by {difference:.2g})",
            where="training.packing",
            hint="training.packing=false",
        )


def _every_label(example: Example) -> Example:
    """Return the beginning of a row, all of it trained."""
    ids = example.inputs["input_ids"][:TRIED_TOKENS]
    return Example({"input_ids": list(ids)}, list(ids))


def _logits(model: PreTrainedModel, task: Task, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    logits: Tensor = task.objective.forward(
        model, {name: tensor.to(device) for name, tensor in batch.items()}
    ).logits.float()
    return logits
