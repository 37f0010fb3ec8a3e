"""A model's outputs for a small input, to compare them before and after its weights change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftwerk.methods.placement import module_device
from graftwerk.modeling.module_index import modes_restored

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Bound on the change of outputs by rounding, relative to the largest; 1e-2 for the 16-bit types."""


@torch.no_grad()
def sample_answer(model: PreTrainedModel) -> Tensor | None:
    """Return logits (or last hidden states), (1, ...), for four tokens or one image; None if it takes neither."""
    inputs = _inputs(model)
    if inputs is None:
        return None
    with modes_restored(model):
        model.eval()
        try:
            output = model(**inputs)
        except Exception:  # an input that it does not take, whatever it raises then: nothing can be compared
            return None
    for name in ("logits", "last_hidden_state"):
        answer = output.get(name) if isinstance(output, dict) else None
        if isinstance(answer, Tensor) and answer.is_floating_point():
            return answer.detach()
    return None


def is_rounding(after: Tensor, before: Tensor) -> bool:
    """Return True if two outputs, any shape, differ by no more than the rounding of the model's dtype explains."""
    return _share(after, before) <= _ROUNDING.get(before.dtype, 1e-2)


def is_another_answer(after: Tensor, before: Tensor, base: Tensor) -> bool:
    """Return True if outputs (any shape) differ far beyond rounding, or as much as the adapter changes the base's."""
    apart, effect = _share(after, before), _share(before, base)
    return apart > 100 * _ROUNDING.get(before.dtype, 1e-2) or apart > effect / 2


def _share(a: Tensor, b: Tensor) -> float:
    largest = float(b.abs().max())
    return float((a - b).abs().max()) / (largest or 1.0)


def _inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    config: Any = model.config
    device = module_device(model)
    if model.main_input_name == "input_ids":
        size = getattr(config, "vocab_size", None) or 0
        if size < 4:
            return None
        end = config.eos_token_id if isinstance(getattr(config, "eos_token_id", None), int) else 3
        ids = torch.tensor([[1, 3, 2, end if 0 <= end < size else 3]], device=device)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if model.main_input_name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if isinstance(height, int) and isinstance(width, int):
            draw = torch.Generator("cpu").manual_seed(0)
            image = torch.rand(1, channels, height, width, generator=draw, device="cpu")
            return {"pixel_values": image.to(device, model.dtype)}
    return None
