"""Folding deltas into the base's weights and taking them out again, bit for bit.

Merging writes the folded weight into a new tensor and keeps the old one; unmerging puts the old one back. So unmerge
is exact and costs nothing, for the memory of the touched weights while merged. Who wants no way back adds in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from graftwerk.errors import ResourceError, UnsupportedError
from graftwerk.kernels.dispatch import merge_in_place
from graftwerk.methods.base import AdapterModule, base_weight, is_quantized, is_transposed

SavedWeights = list[tuple[nn.Parameter, Tensor]]
"""Parameters that were folded into, and their tensors from before."""


@torch.no_grad()
def merge_weights(layers: Iterable[tuple[str, nn.Module, AdapterModule]]) -> SavedWeights:
    """Fold each delta into its layer. If one cannot be folded, none is.

    Raises:
        UnsupportedError: the base is quantized; folding would round the adapter away.
    """
    folded: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    for path, module, delta in layers:
        _refuse_quantized(path, module)
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        weight, new_bias = delta.merged_weight(base_weight(module), None if bias is None else bias.detach())
        folded.append((path, module, (weight.T if is_transposed(module) else weight).contiguous(), new_bias))
    kept: SavedWeights = []
    for _, module, weight, new_bias in folded:
        for own, new in ((module.weight, weight), (module.bias, new_bias)):
            if isinstance(own, nn.Parameter) and new is not None and new.data_ptr() != own.data_ptr():
                kept.append((own, own.data))
                own.data = new
    return kept


@torch.no_grad()
def merge_weights_in_place(layers: Sequence[tuple[str, nn.Module, AdapterModule]]) -> None:
    """Fold each delta into its layer in place: no memory, and no way back.

    Raises:
        UnsupportedError: the base is quantized; nothing is changed.
        EnvironmentFault: memory gave out on the way.
    """
    for path, module, _ in layers:
        _refuse_quantized(path, module)
    for number, (path, module, delta) in enumerate(layers):
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        try:
            merge_in_place(delta, base_weight(module), None if bias is None else bias.detach())
        except (MemoryError, RuntimeError) as error:
            raise ResourceError(
                f"merging stopped after {number} of {len(layers)} layers: {error}; the base is neither what it was nor "
                f"merged",
                where=path,
                hint="load the base again",
            ) from error


def _refuse_quantized(path: str, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_quantized(weight):
        raise UnsupportedError(
            f"an adapter cannot be merged into a {'4' if hasattr(weight, 'quant_state') else '8'}-bit base: rounding "
            f"would lose it",
            where=path,
            hint="load the base unquantized and merge there",
        )


@torch.no_grad()
def unmerge_weights(kept: SavedWeights) -> SavedWeights:
    """Put the tensors from before back into their parameters; gives those that were there, to undo it with."""
    taken = [(parameter, parameter.data) for parameter, _ in kept]
    for parameter, tensor in kept:
        parameter.data = tensor
    return taken
