"""Adapted modules: the same object with another class, so that nothing of the base moves or is renamed.

`adapt(module)` gives a linear layer (plain, GPT-2's transposed, 4- or 8-bit) or a norm the class ``Adapted<its
class>``; its adapter modules are in one child, the `AdapterSlots`. `restore(module)` undoes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.kernels.dispatch import fused_forward
from graftwerk.kernels.memory_efficient import ACTIVATIONS, OWN, efficient_mixin
from graftwerk.kernels.recompute import ActivationTable
from graftwerk.modeling.accelerate_compat import change_class, is_replaced, swapped_class
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots, slots_of
from graftwerk.modeling.per_row_adapters import forward_rows

if TYPE_CHECKING:
    _Layer = nn.Linear
else:
    _Layer = object


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


class AdaptedWeight(_Layer):
    """Mixin for a layer that is never called: its weight and bias are read with the active adapters merged in."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in) with the active adapters merged in."""
        return self._read()[0]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias (out,) with the active adapters merged in, or None."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        slots = self._modules[CHILD]
        assert isinstance(slots, AdapterSlots)
        adapters = slots.active()
        if not adapters:
            return weight, bias
        for adapter in adapters:
            weight, bias = adapter.merged_weight(weight, bias)
        return weight, bias


class AdaptedHead(nn.Module):
    """Mixin before the class of a task head: each adapter's own copy of the head computes its rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slots = self._modules[CHILD]
        assert isinstance(slots, AdapterSlots)
        selection = slots.selection
        if selection.rows is None:
            copies = [head for name in selection.names if (head := slots.get(name)) is not None]
            return _answer(copies[-1], args, kwargs) if copies else super().forward(*args, **kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        size = first.shape[0]
        outputs, order = [], []
        for group in selection.groups(size, first.device):
            order.append(group.index)
            if (head := slots.get(group.name)) is None:
                # Over the whole batch: a product of fewer rows may end in another last bit, and these are the base's.
                outputs.append(super().forward(*args, **kwargs)[group.index])
            else:
                part_args = [_rows(value, size, group.index) for value in args]
                part_kwargs = {key: _rows(value, size, group.index) for key, value in kwargs.items()}
                outputs.append(_answer(head, part_args, part_kwargs))
        _check_same_width(outputs)
        return torch.cat(outputs)[torch.argsort(torch.cat(order))]


def _answer(head: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an adapter's copy of a head.

    The copy is float32; inputs and outputs keep the dtype of the base, which may be another.
    """
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
    own = next((parameter.dtype for parameter in head.parameters()), None)
    if given is None or own in (None, given.dtype) or torch.is_autocast_enabled(given.device.type):
        return head(*args, **kwargs)

    def cast(value: Any) -> Any:
        return value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value

    answer = head(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})
    return answer.to(given.dtype) if isinstance(answer, Tensor) else answer


def _rows(value: Any, size: int, index: Tensor) -> Any:
    return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value


def _check_same_width(outputs: list[Tensor]) -> None:
    widths = sorted({output.shape[-1] for output in outputs})
    if len(widths) > 1:
        raise UnsupportedError(
            f"the heads of the adapters in this batch give different numbers of scores: {widths}",
            where="activate(model, rows=...)",
            hint="put only adapters with equally many labels, and none without a head of that size, into one batch",
        )


def adapt(module: nn.Module, slots: AdapterSlots, *, head: bool = False, weight_only: bool = False) -> None:
    """Give a module its adapted class. A second call changes nothing.

    Args:
        module: A module of the base.
        slots: Its child from now on.
        head: True for a task head.
        weight_only: True if the module is read and never called (`TargetModule.weight_only`).

    Raises:
        UnsupportedError: another library has put a forward of its own on the module, so that the class is never used.
    """
    if not hasattr(type(module), "_graftwerk_base"):
        if is_replaced(module):
            raise UnsupportedError(
                f"the forward of this {type(module).__name__} has been replaced on the object: an adapter would never "
                f"be asked",
                hint="attach the adapter first, and wrap the model then",
            )
        restore_class(module)
        own: Any = type(module)
        mixin: Any = AdaptedHead if head else AdaptedWeight if weight_only else Adapted
        change_class(module, swapped_class(mixin, own, f"Adapted{own.__name__}", _graftwerk_base=own))
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
