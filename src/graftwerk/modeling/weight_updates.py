"""Updates that an adapter adds to the weights of layers: factors where it has them, else the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.lora import LoRAModule
from graftwerk.modeling.adapter import Adapter

Factors = tuple[Tensor, Tensor]
"""B (out, r) and A (r, in), all scales included: the update is B A."""


def updated_layers(adapter: Adapter) -> Iterator[tuple[str, AdapterModule]]:
    """Yield path and module of each layer whose weight an adapter changes.

    Raises:
        UnsupportedError: The adapter is more than updates of the weights of linear layers.
    """
    if adapter.method.kind != "layer" or not adapter.method.mergeable:
        raise UnsupportedError(
            f"`{adapter.name}` is {adapter.method.title}, which is no update of weights",
            hint="lora, hira, miss, shira and oft are",
        )
    tables = {target.path for target in adapter.targets if target.is_table}
    for path, module in adapter.modules():
        if path in adapter.heads:
            continue
        if path in tables or not isinstance(module, AdapterModule) or module.parameter_names[0] != "weight":
            raise UnsupportedError(
                f"`{adapter.name}` trains more than linear layers: `{path}`",
                hint="rows of the embedding and experts' parameters have no update of one weight",
            )
        yield path, module


def rank_of(module: AdapterModule) -> int | None:
    """Return the rank of an update in factors, or None for one that is a whole matrix."""
    return module.lora_A.weight.shape[0] if type(module) is LoRAModule else None


def factors_of(module: AdapterModule) -> Factors:
    """Return B (out, r), scale included, and A (r, in) of a LoRA, in float64."""
    assert isinstance(module, LoRAModule)
    return module.scale * module.lora_B.weight.detach().double(), module.lora_A.weight.detach().double()


@torch.no_grad()
def update_of(path: str, layer: nn.Module, module: AdapterModule) -> Tensor:
    """Return the update of a layer's weight, (out, in), in float64.

    Raises:
        UnsupportedError: The adapter changes the bias as well.
    """
    if type(module) is LoRAModule:
        b, a = factors_of(module)
        return b @ a
    weight = base_weight(layer).double()
    own = layer._parameters.get("bias")
    bias = None if own is None else own.detach().double()
    merged, changed = module.merged_weight(weight, bias)
    if bias is not None and changed is not None and not torch.equal(bias, changed.double()):
        raise UnsupportedError(f"`{path}` has an update of its bias, which is no update of its weight", where=path)
    return merged.double() - weight
