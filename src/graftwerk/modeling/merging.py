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
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.base_weights import base_weight, is_plain, is_quantized, is_transposed, weight_type
from graftwerk.methods.lora_parameters import ParameterAdapters

SavedWeights = list[tuple[nn.Parameter, Tensor]]
"""Parameters that were merged into, and their tensors from before."""


@torch.no_grad()
def merge_weights(layers: Iterable[tuple[str, nn.Module, AdapterModule]]) -> SavedWeights:
    """Merge each adapter into its layer. If one cannot be merged, none is.

    Returns:
        The tensors from before, for `unmerge_weights`.

    Raises:
        UnsupportedError: the base is quantized, so that merging would round the adapter away; it is offloaded, or its
            weights are no plain tensors.
    """
    merged: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    for path, module, adapter in layers:
        _refuse_unmergeable(path, module, adapter)
        merged.append((module, _merged_parameters(module, adapter)))
    saved: SavedWeights = []
    for module, values in merged:
        for name, new in values.items():
            own = module._parameters[name]
            if own is not None and new is not None and new.data_ptr() != own.data_ptr():
                saved.append((own, own.data))
                own.data = new
    return saved


def _merged_parameters(module: nn.Module, adapter: AdapterModule) -> dict[str, Tensor | None]:
    """Return the parameters of a module that an adapter changes, merged, as the module stores them."""
    own = {name: module._parameters[name] for name in adapter.parameter_names}
    base = {name: None if value is None else value.detach() for name, value in own.items()}
    if isinstance(adapter, ParameterAdapters):
        return adapter.merged_parameters(base)
    values = adapter.merged_parameters({**base, "weight": base_weight(module)})
    weight = values["weight"]
    assert weight is not None
    return {**values, "weight": (weight.T if is_transposed(module) else weight).contiguous()}


@torch.no_grad()
def merge_weights_in_place(layers: Sequence[tuple[str, nn.Module, AdapterModule]]) -> None:
    """Merge each adapter into its layer in place: no memory, and no way back.

    Raises:
        UnsupportedError: the base is quantized or offloaded; nothing is changed.
        ResourceError: memory ran out on the way.
    """
    for path, module, adapter in layers:
        _refuse_unmergeable(path, module, adapter)
    for number, (path, module, adapter) in enumerate(layers):
        try:
            if isinstance(adapter, ParameterAdapters):
                for name in adapter.parameter_names:
                    value = module._parameters[name]
                    assert value is not None
                    adapter.update_of(name).merge_(value.data)
            else:
                bias = module._parameters.get("bias")
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
    for path, module, adapter in layers:
        names = adapter.parameter_names if isinstance(adapter, ParameterAdapters) else ("weight",)
        if any(len(owners.get(id(module._parameters.get(name)), set()) - sharing) > 1 for name in names):
            raise UnsupportedError(
                f"the weight of `{path}` is tied to another module's, which merging would change as well",
                where=path,
                hint="serve the adapter unmerged, or untie the weights of the base (tie_word_embeddings=False) first",
            )


def _refuse_unmergeable(path: str, module: nn.Module, adapter: AdapterModule) -> None:
    names = adapter.parameter_names
    weight = module._parameters.get(names[0])  # an adapted layer may show others a changed one
    if weight is None or any(name not in module._parameters for name in names):
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
            hint="`graftwerk merge` (graftwerk.merge) writes a model with full weights; or load the base unquantized",
        )
    for value in (module._parameters[name] for name in names):
        if value is not None and not is_plain(value):
            raise UnsupportedError(
                f"an adapter cannot be merged into {weight_type(value)}: it stores codes, or a part of the whole",
                where=path,
                hint="load the base in bfloat16 or float32, in one process, and merge there",
            )


@torch.no_grad()
def unmerge_weights(saved: SavedWeights) -> SavedWeights:
    """Put the tensors from before back into their parameters; return the merged ones, to undo it with."""
    merged = [(parameter, parameter.data) for parameter, _ in saved]
    for parameter, tensor in saved:
        parameter.data = tensor
    return merged
