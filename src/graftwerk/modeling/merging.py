"""Folding deltas into the base's weights and taking them out again, bit for bit.

Merging writes the folded weight into a new tensor and keeps the old one; unmerging puts the old one back. So unmerge
is exact and costs nothing, for the memory of the touched weights while merged. Who wants no way back adds in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
        UnsupportedError: the base is quantized, so that folding would round the adapter away; or it is offloaded.
    """
    folded: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    for path, module, delta in layers:
        _refuse_unfoldable(path, module)
        bias = module._parameters["bias"]
        weight, new_bias = delta.merged_weight(base_weight(module), None if bias is None else bias.detach())
        folded.append((path, module, (weight.T if is_transposed(module) else weight).contiguous(), new_bias))
    kept: SavedWeights = []
    for _, module, weight, new_bias in folded:
        for own, new in ((module._parameters["weight"], weight), (module._parameters["bias"], new_bias)):
            if own is not None and new is not None and new.data_ptr() != own.data_ptr():
                kept.append((own, own.data))
                own.data = new
    return kept


@torch.no_grad()
def merge_weights_in_place(layers: Sequence[tuple[str, nn.Module, AdapterModule]]) -> None:
    """Fold each delta into its layer in place: no memory, and no way back.

    Raises:
        UnsupportedError: the base is quantized or offloaded; nothing is changed.
        EnvironmentFault: memory gave out on the way.
    """
    for path, module, _ in layers:
        _refuse_unfoldable(path, module)
    for number, (path, module, delta) in enumerate(layers):
        bias = module._parameters["bias"]
        try:
            merge_in_place(delta, base_weight(module), None if bias is None else bias.detach())
        except (MemoryError, RuntimeError) as error:
            raise ResourceError(
                f"merging stopped after {number} of {len(layers)} layers: {error}; the base is neither what it was nor "
                f"merged",
                where=path,
                hint="load the base again",
            ) from error


def refuse_tied(layers: Iterable[tuple[str, nn.Module, AdapterModule]], base: Mapping[str, nn.Module]) -> None:
    """Raise UnsupportedError if a layer's weight is another module's too (a tied `lm_head`), which must not change."""
    owners: dict[int, set[int]] = {}
    for module in base.values():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    for path, module, _ in layers:
        if len(owners.get(id(module._parameters.get("weight")), ())) > 1:
            raise UnsupportedError(
                f"the weight of `{path}` is tied to another module's, which merging would change as well",
                where=path,
                hint="serve the adapter unmerged, or untie the weights of the base (tie_word_embeddings=False) first",
            )


def _refuse_unfoldable(path: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")  # an adapted layer may show others a changed one
    if weight is None or "bias" not in module._parameters:
        raise UnsupportedError(
            "an adapter cannot be merged into a weight that is computed from others (a parametrization)",
            where=path,
            hint="serve it unmerged, or remove the parametrization from the base first",
        )
    if weight.is_meta:
        raise UnsupportedError(
            "an adapter cannot be merged into weights that are offloaded (or not loaded at all): there is nothing to "
            "add to",
            where=path,
            hint="merge first and offload then, or take accelerate's hooks off",
        )
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
