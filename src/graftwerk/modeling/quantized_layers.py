"""Quantized layers of a model, whoever quantized it: how they are stored, and plain layers in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base_weights import base_weight, is_quantized
from graftwerk.modeling.module_index import base_modules

REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit layers: on a CPU with bfloat16 instructions, a pass in evaluation packs the codes
anew and rounds their scales to bfloat16. A packed layer propagates no gradients, and its codes are in another order."""


def refuse_packed(modules: Mapping[str, nn.Module]) -> None:
    """Raise if a layer of these modules (by path) was packed for inference.

    Raises:
        UnsupportedError: One was; unpacking would not bring back its scales.
    """
    for path, module in modules.items():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(
                "bitsandbytes has packed this 4-bit layer for inference, in a pass in evaluation: its scales are "
                "rounded to bfloat16, and no gradients would go through it",
                where=path,
                hint="load the model again, and attach the adapter before the first pass",
            )


def keep_unpacked(modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Have evaluation leave 4-bit layers as they are, and return the layers that it would have packed.

    Args:
        modules: Modules of a base, by path.
    """
    packed_later = [module for module in modules.values() if vars(module).get(REPACKS)]
    for module in packed_later:
        setattr(module, REPACKS, False)
    return packed_later


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how a model's linear layers are quantized by bitsandbytes, whoever did it, or None if none is.

    Returns:
        ``name`` (``nf4``, ``fp4``, ``int8``), ``double_quant``, ``compute_type`` and ``skip``, the paths of the linear
        layers that are not quantized.
    """
    first: Tensor | None = None
    skipped = []
    compute = "auto"
    for path, module in base_modules(model).items():
        if not isinstance(module, nn.Linear | Conv1D) or (weight := module._parameters.get("weight")) is None:
            continue
        if not is_quantized(weight):
            skipped.append(path)
        elif first is None:
            first = weight
            if (own := getattr(module, "compute_dtype", None)) is not None:
                compute = str(own).removeprefix("torch.")
    if first is None:
        return None
    if (state := getattr(first, "quant_state", None)) is None:
        return {"name": "int8", "double_quant": None, "compute_type": "auto", "skip": skipped}
    return {"name": str(state.quant_type), "double_quant": state.nested, "compute_type": compute, "skip": skipped}


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> None:
    """Give a model without adapters plain linear layers again, in place, with the values that the codes stand for."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            weight, full = base_weight(module), nn.Linear(1, 1, module.bias is not None)
            if getattr(module, "source_cls", nn.Linear) is Conv1D:
                weight, full = weight.T.contiguous(), Conv1D(1, 1)
                full.nf, full.nx = module.out_features, module.in_features
            else:
                full.in_features, full.out_features = module.in_features, module.out_features
            full.weight, full.bias = nn.Parameter(weight, requires_grad=False), module.bias
            model.set_submodule(path, full.train(module.training))
    model.hf_quantizer.remove_quantization_config(model)
    for key in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(key, None)
