"""Saved modules, such as the task head: each adapter's own copy of the module computes its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import AdapterModule
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object  # a mixin that were a module itself would come after the module's own class


class AdaptedHead(_Module):
    """Mixin before the class of a saved module: each adapter's own copy of the module computes its rows.

    Another adapter may have an adapter module here; rows without a copy go to the class below, which applies it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the active adapter's copy, for each row that of its adapter, or else of the class below.

        Args:
            args: Inputs of the module, tensors of any shape, rows first.
            kwargs: Inputs by name.

        Raises:
            UnsupportedError: rows have different adapters, and their outputs are not one tensor of equal width each.
        """
        slots = self._modules[CHILD]
        assert isinstance(slots, AdapterSlots)
        selection = slots.selection
        if selection.rows is None:
            last = _last_copy(slots, selection.names)
            return super().forward(*args, **kwargs) if last is None else _answer(self, last, args, kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        size = first.shape[0]
        base: Any = None
        outputs, order = [], []
        for group in selection.groups(size, first.device):
            order.append(group.index)
            if (head := _copy(slots, group.name)) is None:
                # Over the whole batch: a product of fewer rows may end in another last bit, and these are the base's.
                base = super().forward(*args, **kwargs) if base is None else base
                answer = base[group.index] if isinstance(base, Tensor) else base
            else:
                part_args = [_rows(value, size, group.index) for value in args]
                part_kwargs = {key: _rows(value, size, group.index) for key, value in kwargs.items()}
                answer = _answer(self, head, part_args, part_kwargs)
            if not isinstance(answer, Tensor):
                raise UnsupportedError(
                    f"the saved module {type(head or self).__name__} answers with more than one tensor, so its answer "
                    f"cannot be put together row by row",
                    where="activate(model, rows=...)",
                    hint="run the rows of each adapter in a batch of their own",
                )
            outputs.append(answer)
        _check_same_width(outputs)
        return torch.cat(outputs)[torch.argsort(torch.cat(order))]


def _last_copy(slots: AdapterSlots, names: Sequence[str]) -> nn.Module | None:
    """Return the copy of the last adapter that has one; a loop, which dynamo traces as it is."""
    for name in reversed(names):
        if (copy := _copy(slots, name)) is not None:
            return copy
    return None


def _copy(slots: AdapterSlots, name: str | None) -> nn.Module | None:
    """Return an adapter's own copy of a saved module, or None if it has none here."""
    module = slots.get(name)
    return None if isinstance(module, AdapterModule) else module


def _answer(host: nn.Module, head: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an adapter's copy of a module.

    The copy is float32; inputs and outputs keep the dtype of the base, which may be another. The output of an
    embedding, whose inputs are integers, has the dtype of the base's own weight.

    Args:
        host: The base's module.
        head: The adapter's copy of it.
        args: Inputs of the module, tensors of any shape.
        kwargs: Inputs by name.
    """
    own = next((parameter.dtype for parameter in head.parameters()), None)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    given = next((value.dtype for value in tensors if value.is_floating_point()), None)
    if given is None:
        weights = (weight.dtype for weight in host._parameters.values() if weight is not None)
        given = next((dtype for dtype in weights if dtype.is_floating_point), own)
    if own in (None, given) or any(torch.is_autocast_enabled(value.device.type) for value in tensors):
        return head(*args, **kwargs)

    def cast(value: Any, dtype: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cast(item, dtype) for item in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    answer = head(*(cast(value, own) for value in args), **{key: cast(value, own) for key, value in kwargs.items()})
    return cast(answer, given)


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
