"""Folding deltas into the base's weights and taking them out again, bit for bit.

Merging writes the folded weight into a new tensor and keeps the old one; unmerging puts the old one back. So unmerge
is exact and costs nothing, for the memory of the touched weights while merged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Delta, base_weight, is_transposed

Kept = dict[str, tuple[Tensor, Tensor | None]]
"""Path of a layer -> its weight and bias before merging."""


@torch.no_grad()
def fold(layers: Iterable[tuple[str, nn.Module, Delta]]) -> Kept:
    """Fold each delta into its layer. If one cannot be folded, none is.

    Raises:
        UnsupportedError: the base is quantized; folding would round the adapter away.
    """
    folded: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    for path, module, delta in layers:
        if hasattr(module.weight, "quant_state"):
            raise UnsupportedError(
                "an adapter cannot be merged into a 4-bit base: rounding would lose it",
                where=path,
                mend="load the base unquantized and merge there",
            )
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        weight, new_bias = delta.folded(base_weight(module), None if bias is None else bias.detach())
        folded.append((path, module, (weight.T if is_transposed(module) else weight).contiguous(), new_bias))
    kept: Kept = {}
    for path, module, weight, new_bias in folded:
        own_weight, own_bias = module.weight, module.bias
        assert isinstance(own_weight, Tensor)
        assert own_bias is None or isinstance(own_bias, Tensor)
        kept[path] = (own_weight.data, None if own_bias is None else own_bias.data)
        own_weight.data = weight
        if new_bias is not None and own_bias is not None:
            own_bias.data = new_bias
    return kept


@torch.no_grad()
def unfold(model: nn.Module, kept: Kept) -> None:
    """Put the tensors from before back into their parameters."""
    for path, (weight, bias) in kept.items():
        module = model.get_submodule(path)
        module.weight.data = weight
        if bias is not None:
            module.bias.data = bias
