"""What the tests of prefixes and prompts share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from graftwerk.methods.base import Method
from graftwerk.modeling.attach import Adapter, attach
from tests.families import FAMILIES

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
CAUSAL = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
SEQ2SEQ = [name for name, family in FAMILIES.items() if family.kind == "seq2seq"]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def perturb(parameters: Iterable[torch.nn.Parameter], seed: int, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def moved(model: Any, method: Method, name: str, seed: int) -> Adapter:
    """A new adapter whose every element was moved away from its start."""
    torch.manual_seed(seed)
    graft = attach(model, method, name=name)
    perturb(graft.parameters(), seed)
    return graft


def one(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, its padding cut off (at either end)."""
    real = batch["attention_mask"][row].bool()
    return {
        key: value[row : row + 1] if key.startswith("decoder") else value[row : row + 1, real]
        for key, value in batch.items()
    }


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flip(1) for key, value in batch.items()}


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens (B, 5) and the scores (B, 5, V) that they were chosen by."""
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    result = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    return result.sequences[:, -5:], torch.stack(result.logits, dim=1)


def expect_rows(together: Tensor, alone: list[Tensor], batch: dict[str, Tensor]) -> None:
    """Row by row the same, padding left out; ``alone`` are results (1, ...) of rows without padding."""
    for row, single in enumerate(alone):
        mine = together[row]
        if mine.dim() == 2 and "decoder_input_ids" not in batch:
            mine = mine[batch["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, single[0], **CLOSE, msg=lambda text, at=row: f"row {at}: {text}")
