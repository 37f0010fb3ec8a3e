"""Adapted modules: the same object with another class, so that nothing of the base moves or is renamed.

    x' = pre_forward(x),   y = the layer's own forward(x'),   y' = post_forward(x', y)          `Adapted.forward`

`adapt(module)` gives a linear layer (plain, GPT-2's transposed, 4- or 8-bit) or a norm the class ``Adapted<its
class>``; its adapter modules are in one child, the `AdapterSlots`. `restore(module)` undoes both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.kernels.dispatch import fused_forward
from graftwerk.kernels.memory_efficient import ACTIVATIONS, OWN, efficient_mixin
from graftwerk.kernels.recompute import ActivationTable
from graftwerk.methods.base_weights import weight_type
from graftwerk.modeling.accelerate_compat import change_class, is_replaced, swapped_class
from graftwerk.modeling.adapted_head import AdaptedHead
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots, slots_of
from graftwerk.modeling.per_row_adapters import forward_rows

if TYPE_CHECKING:
    _Layer = nn.Linear
    _Module = nn.Module
else:
    _Layer = _Module = object  # a mixin that were a module itself would come after the layer's own class


class Adapted(_Layer):
    """Mixin before a layer's own class: pre_forward, the layer itself, post_forward."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the output (..., out) of the layer and its active adapters for x (..., in)."""
        (x,) = args or kwargs.values()  # whatever the layer's own class calls its input
        slots = self._modules[CHILD]
        assert isinstance(slots, AdapterSlots)
        if slots.selection.rows is not None:
            return forward_rows(slots, super().forward, x)
        adapters = slots.active()
        if not adapters:
            return super().forward(x)
        if (fused := fused_forward(self, adapters, x, slots.selection.activations)) is not None:
            return fused
        for adapter in adapters:
            x = adapter.pre_forward(x)
        y = super().forward(x)
        for adapter in adapters:
            y = adapter.post_forward(x, y)
        return y


MERGED = "_graftwerk_merged"
"""Attribute of a module in its forward pass: its parameters with the active adapters merged in, by name."""


class AdaptedParameters(_Module):
    """Mixin for a module whose parameters are read with the active adapters merged in.

    In a forward pass of the module each is computed once, however often it is read (a layer of experts reads its
    weights once for each expert); a layer that is never called computes its weight whenever its parent reads it.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parameters", ()) and CHILD in self.__dict__["_modules"]:
            merged = self.__dict__.get(MERGED)
            merged = self._merged() if merged is None else merged
            if name in merged:
                return merged[name]
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module with the active adapters merged into its parameters.

        Args:
            args: Inputs of the module, tensors of any shape.
            kwargs: Inputs by name.
        """
        before = self.__dict__.get(MERGED)
        self.__dict__[MERGED] = self._merged()
        try:
            return super().forward(*args, **kwargs)
        finally:
            if before is None:
                del self.__dict__[MERGED]
            else:
                self.__dict__[MERGED] = before

    def _merged(self) -> dict[str, Tensor | None]:
        slots = self._modules[CHILD]
        assert isinstance(slots, AdapterSlots)
        merged: dict[str, Tensor | None] = {}
        # Adapters that differ by row are refused here; where rows are chosen, none of them is for this module.
        for adapter in slots.active() if slots.selection.rows is None else ():
            own = {name: merged.get(name, self._parameters[name]) for name in adapter.parameter_names}
            if any(value is not None and value.is_meta for value in own.values()):
                return {}  # offloaded; who reads it now moves it
            merged |= adapter.merged_parameters(own)
        return merged


class AdaptedLayerHead(AdaptedHead, Adapted):
    """Mixin before a layer that one adapter adapts and another saves whole: the copies take precedence."""


def adapt(module: nn.Module, slots: AdapterSlots, *, head: bool = False, read: bool = False) -> None:
    """Give a module its adapted class. A second call changes nothing.

    A layer that one adapter adapts and another saves whole gets both classes: the copies take precedence.

    Args:
        module: A module of the base.
        slots: Its child from now on.
        head: True for a module that an adapter saves whole, such as a task head.
        read: True if adapters change parameters of the module that are read: named ones, or the weight of a layer that
            is never called (`TargetModule.weight_only`).

    Raises:
        UnsupportedError: another library has put a forward of its own on the module, so that the class is never used.
    """
    cls = type(module)
    if not hasattr(cls, "_graftwerk_base"):
        weight = module._parameters.get("weight")
        called_on_parts = is_replaced(module) or module._forward_pre_hooks
        if weight is not None and hasattr(weight, "placements") and called_on_parts:
            raise UnsupportedError(
                f"the weight of this {type(module).__name__} is cut by tensor parallelism ({weight_type(weight)}), and "
                f"the parameters of an adapter are whole",
                hint="load the base without it (`tp_plan`, `parallelize_module`); FSDP2 works",
            )
        if is_replaced(module):
            raise UnsupportedError(
                f"the forward of this {type(module).__name__} has been replaced on the object: an adapter would never "
                f"be asked",
                hint="attach the adapter first, and wrap the model then",
            )
        restore_class(module)
    cls = type(module)
    base: Any = getattr(cls, "_graftwerk_base", cls)
    wanted: Any = AdaptedHead if head else AdaptedParameters if read else Adapted
    if not issubclass(cls, wanted):
        mixin: Any = AdaptedLayerHead if issubclass(cls, AdaptedHead | Adapted) else wanted
        change_class(module, swapped_class(mixin, base, f"Adapted{base.__name__}", _graftwerk_base=base))
    assert slots_of(module) is slots


def restore(module: nn.Module) -> None:
    """Give a module its own class back and remove its slots."""
    change_class(module, getattr(type(module), "_graftwerk_base", type(module)))
    module._modules.pop(CHILD, None)


def make_memory_efficient(modules: Iterable[nn.Module], activations: ActivationTable) -> None:
    """Give each known frozen module its memory-efficient class. A second call changes nothing.

    Args:
        modules: Modules of the base.
        activations: The table in which they note how their outputs are recomputed.
    """
    for module in modules:
        mixin: Any = efficient_mixin(module)
        if mixin is not None:
            own: Any = type(module)
            change_class(module, swapped_class(mixin, own))
            module.__dict__[ACTIVATIONS] = activations


def restore_modules(modules: Iterable[nn.Module]) -> None:
    """Give every memory-efficient module its own class back."""
    for module in modules:
        restore_class(module)


def restore_class(module: nn.Module) -> None:
    """Give one module its own class back, if it is memory-efficient."""
    change_class(module, getattr(type(module), OWN, type(module)))
    module.__dict__.pop(ACTIVATIONS, None)
