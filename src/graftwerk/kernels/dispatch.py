"""The dispatch of kernels: the one place where a kernel is chosen in place of a method's plain path.

Methods do not know their kernels: a kernel is registered here for a type of adapter module, says which calls it
supports, and must equal the plain path (tests/kernels). A method without an entry runs its plain path, which is always
right. `flags.plain()` turns all kernels off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from graftwerk.kernels.batched_adapters import (
    BatchedAdapter,
    BatchedBitFit,
    BatchedDoRA,
    BatchedIA3,
    BatchedInputTap,
    BatchedLoRA,
    BatchedParallel,
    BatchedSequential,
)
from graftwerk.kernels.fused_lora import FusedDoRA, FusedLoRA, merge_lora_
from graftwerk.kernels.recompute import ActivationTable
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.bitfit import BitFitModule
from graftwerk.methods.bottleneck import InputTap, ParallelAdapter, SequentialAdapter
from graftwerk.methods.dora import DoRAModule
from graftwerk.methods.ia3 import IA3Module
from graftwerk.methods.lora import LoRAModule
from graftwerk.methods.pissa import PiSSAModule


class FusedKernel(Protocol):
    """A layer and its active adapters in one kernel."""

    def supports(self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor) -> bool:
        """Return True if the kernel equals the plain path here.

        Args:
            layer: The adapted layer.
            adapters: Its active adapter modules, in order.
            x: Input, (..., in).
        """
        ...

    def __call__(
        self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor, activations: ActivationTable
    ) -> Tensor:
        """Run the layer and its adapters.

        Args:
            layer: The adapted layer.
            adapters: Its active adapter modules, in order.
            x: Input, (..., in).
            activations: The table of the model's living activations.

        Returns:
            (..., out).
        """
        ...


FUSED: Mapping[type[AdapterModule], FusedKernel] = {
    LoRAModule: FusedLoRA(),
    PiSSAModule: FusedLoRA(),
    DoRAModule: FusedDoRA(),
}
"""The kernel for a layer whose first active adapter is of this type."""

BATCHED: Mapping[type[AdapterModule], type[BatchedAdapter]] = {
    LoRAModule: BatchedLoRA,
    PiSSAModule: BatchedLoRA,
    DoRAModule: BatchedDoRA,
    IA3Module: BatchedIA3,
    BitFitModule: BatchedBitFit,
    SequentialAdapter: BatchedSequential,
    ParallelAdapter: BatchedParallel,
    InputTap: BatchedInputTap,
}
"""The batched form of a type of adapter module, for batches whose rows have different adapters."""


def fused_forward(
    layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor, activations: ActivationTable
) -> Tensor | None:
    """Run a layer and its active adapters in one kernel.

    Args:
        layer: The adapted layer; its own ``forward`` is not called.
        adapters: The active adapters there, in order, at least one.
        x: (..., in).
        activations: The table of the model's living activations.

    Returns:
        (..., out), or None if no kernel supports them: take the plain path.
    """
    kernel = None if torch.compiler.is_compiling() else FUSED.get(type(adapters[0]))
    if kernel is None or not kernel.supports(layer, adapters, x):
        return None
    return kernel(layer, adapters, x, activations)


def merge_in_place(adapter: AdapterModule, weight: Tensor, bias: Tensor | None) -> None:
    """Merge as ``adapter.merged_weight`` does, into ``weight`` (out, in) and ``bias`` (out,) themselves."""
    if type(adapter) is LoRAModule and merge_lora_(adapter, weight):
        return
    new_weight, new_bias = adapter.merged_weight(weight, bias)
    for own, new in ((weight, new_weight), (bias, new_bias)):
        if own is not None and new is not None and new.data_ptr() != own.data_ptr():
            own.copy_(new)
