"""Merge adapters into the base's weights and unmerge them, bit for bit.

Merging writes the merged weight into a new tensor and keeps the old one; unmerging puts the old one back. So unmerging
is exact and costs nothing, for the memory of the touched weights while merged. Without a way back, merging adds in
place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graftwerk.errors import ResourceError, UnsupportedError
from graftwerk.kernels.dispatch import merge_in_place
from graftwerk.methods.base import AdapterModule, base_weight, is_quantized, is_transposed

SavedWeights = list[tuple[nn.Parameter, Tensor]]
"""Parameters that were merged into, and their tensors from before."""


@torch.no_grad()
def merge_weights(layers: Iterable[tuple[str, nn.Module, AdapterModule]]) -> SavedWeights:
    """Merge each adapter into its layer. If one cannot be merged, none is.

    Args:
        layers: Path, base module and adapter module of each.

    Returns:
        The tensors from before, for `unmerge_weights`.

    Raises:
        UnsupportedError: the base is quantized, so that merging would round the adapter away; or it is offloaded.
    """
    merged: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    for path, module, adapter in layers:
        _refuse_unmergeable(path, module)
        bias = module._parameters.get("bias")
        weight, new_bias = adapter.merged_weight(base_weight(module), None if bias is None else bias.detach())
        merged.append((path, module, (weight.T if is_transposed(module) else weight).contiguous(), new_bias))
    saved: SavedWeights = []
    for _, module, weight, new_bias in merged:
        for own, new in ((module._parameters["weight"], weight), (module._parameters.get("bias"), new_bias)):
            if own is not None and new is not None and new.data_ptr() != own.data_ptr():
                saved.append((own, own.data))
                own.data = new
    return saved


@torch.no_grad()
def merge_weights_in_place(layers: Sequence[tuple[str, nn.Module, AdapterModule]]) -> None:
    """Merge each adapter into its layer in place: no memory, and no way back.

    Args:
        layers: Path, base module and adapter module of each.

    Raises:
        UnsupportedError: the base is quantized or offloaded; nothing is changed.
        ResourceError: memory ran out on the way.
    """
    for path, module, _ in layers:
        _refuse_unmergeable(path, module)
    for number, (path, module, adapter) in enumerate(layers):
        bias = module._parameters.get("bias")
        try:
            merge_in_place(adapter, base_weight(module), None if bias is None else bias.detach())
        except (MemoryError, RuntimeError) as error:
            raise ResourceError(
                f"merging stopped after {number} of {len(layers)} layers: {error}; the base is neither what it was nor "
                f"merged",
                where=path,
                hint="load the base again",
            ) from error


def refuse_tied(layers: Iterable[tuple[str, nn.Module, AdapterModule]], base: Mapping[str, nn.Module]) -> None:
    """Check that no layer's weight is also another module's (a tied `lm_head`), which must not change.

    Args:
        layers: Path, base module and adapter module of each, those included that share the weight of another.
        base: All modules of the base by path.

    Raises:
        UnsupportedError: a weight is tied.
    """
    layers = list(layers)
    sharing = {id(module) for _, module, adapter in layers if adapter.shares_weight}
    owners: dict[int, set[int]] = {}
    for module in base.values():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    for path, module, _ in layers:
        if len(owners.get(id(module._parameters.get("weight")), set()) - sharing) > 1:
            raise UnsupportedError(
                f"the weight of `{path}` is tied to another module's, which merging would change as well",
                where=path,
                hint="serve the adapter unmerged, or untie the weights of the base (tie_word_embeddings=False) first",
            )


def _refuse_unmergeable(path: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")  # an adapted layer may show others a changed one
    if weight is None or ("bias" not in module._parameters and not isinstance(module, nn.Embedding)):
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
def unmerge_weights(saved: SavedWeights) -> SavedWeights:
    """Put the tensors from before back into their parameters; return the merged ones, to undo it with."""
    merged = [(parameter, parameter.data) for parameter, _ in saved]
    for parameter, tensor in saved:
        parameter.data = tensor
    return merged
