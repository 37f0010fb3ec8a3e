"""Tiny models of architectures that do something unusual with their layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.methods.base import Method
from tests.contract.cases import perturb

S: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
PATCHES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def built(cls: str, config: Any) -> Any:
    """A model in float64 and eval mode, every weight generic."""
    torch.manual_seed(0)
    for key in list(vars(config)):
        if "dropout" in key or key.endswith("layerdrop"):
            setattr(config, key, 0.0)
    model = getattr(tf, cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double()


def moved(model: Any, method: Method, name: str = "a", seed: int = 1) -> gw.Adapter:
    """A graft in float64 whose every element is away from its start."""
    graft = gw.attach(model, method, name=name)
    perturb(graft.parameters(), seed)
    model.double()
    return graft


def answer(model: Any, **batch: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if name in output:
            return output[name]  # type: ignore[no-any-return]
    raise AssertionError(f"no answer among {list(output)}")


def token_ids(rows: int = 2, tokens: int = 8) -> Tensor:
    return torch.randint(4, 64, (rows, tokens), generator=torch.Generator().manual_seed(3))
