"""A dispatch mode that counts the tensors which operations make, while they live, and the operations themselves.

Some things go on inside of torch and bitsandbytes that a dispatch mode changes or does not see. Autograd's engine sums
gradients in place, and attention with dropout adds its mask in place, but neither does under a mode; the product with
4-bit codes decodes them inside of one operation.
"""

from __future__ import annotations

import dis
import math
import sys
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN: Any = torch.ops.aten
_PRODUCTS = frozenset((_ATEN.mm, _ATEN.addmm, _ATEN.addmm_, _ATEN.bmm, _ATEN.baddbmm, _ATEN.baddbmm_))
_LINEAR = frozenset((_ATEN.mm, _ATEN.addmm, _ATEN.convolution, _ATEN.convolution_backward))
"""Products that grow with the tokens; the other counted ones are attention's, and grow with rows times length^2."""
_LOOKUPS = frozenset((_ATEN.embedding, _ATEN.index_select, _ATEN.gather, _ATEN.index))
"""Operations that read only some rows of a table."""
_CODED = "bitsandbytes::gemm_4bit"
"""Product with a weight of 4 bits."""
_ENGINE = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)
"""Code that runs autograd's engine, the caller of its own sums and of nodes written in C++."""
_TENSOR_REFERENCES, _STORAGE_REFERENCES = 4, 2
"""References to an operand of the engine's sums, and to its storage, that nothing else holds."""


class Operand(NamedTuple):
    """A tensor that an operation is called with, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """An operation and what it is called with; every tensor is an `Operand`, every list a tuple."""

    operation: Any
    given: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operation: Any, given: Sequence[Any], named: Mapping[str, Any]) -> Call:
        """Return the call of an operator of torch with positional and named arguments."""
        return cls(operation, _without_values(given), tuple((name, _without_values(named[name])) for name in named))


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_without_values, value)) if isinstance(value, list | tuple) else value


@dataclass
class Work:
    """Number of equal calls of an operation, and the work of one.

    Attributes:
        times: Calls.
        operations: Floating-point operations of a call that is a product; 0 for all others.
        attention: True if those grow with the square of the length.
        moved: Bytes that a call reads and writes, those of a product left out.
    """

    times: float
    operations: int
    attention: bool
    moved: int


def _caller() -> FrameType | None:
    """Return the frame of the Python code that called the operation which is dispatched, or what it is part of."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("torch._compile", "torch._dynamo.eval_frame"):
        frame = frame.f_back  # which torch puts around the methods of every dispatch mode
    return frame


def _is_summed_in_place(buffer: Tensor) -> bool:
    """Return True if autograd's engine adds a further gradient to this one, any shape, in place.

    It does if nothing else refers to the tensor (torch/csrc/autograd/input_buffer.cpp), but not under a dispatch mode,
    where the sum would be counted as a further tensor. If torch does not expose reference counts, return False.
    """
    references, of_storage = getattr(buffer, "_use_count", None), getattr(torch._C, "_storage_Use_Count", None)
    if references is None or of_storage is None or torch.is_grad_enabled():
        return False
    storage = buffer.untyped_storage()
    alone = of_storage(storage._cdata) == _STORAGE_REFERENCES and references() == _TENSOR_REFERENCES
    return alone and buffer.nbytes == storage.nbytes()


def _is_mask(frame: FrameType, scores: Tensor, added: Any) -> bool:
    """Return True if a sum is torch's own addition of a mask to attention scores (B, H, T, T).

    Torch adds it in place, except under a dispatch mode. A `+` in the code that calls the function does not count.
    """
    code = frame.f_code
    if "scaled_dot_product_attention" not in code.co_names or not isinstance(added, Tensor) or scores.dim() != 4:
        return False
    is_call = not dis.opname[code.co_code[frame.f_lasti]].startswith("BINARY")
    sizes = zip(reversed(scores.shape), reversed(added.shape), strict=False)
    fits = added.dim() <= scores.dim() and all(size in (1, whole) for whole, size in sizes)
    return is_call and fits and torch.result_type(scores, added) == scores.dtype


def _decoded(given: Sequence[Any]) -> list[Tensor]:
    """Return what a product with 4-bit codes takes while it runs: scales of 8 bits, decoded and moved, and the weight.

    Args:
        given: x, codes, shape of the weight, scales, size of a block, name, bias, scales of 8 bits.
    """
    x, shape, block, nested = given[0], given[2], given[4], len(given) > 7 and given[7] is not None
    scales = [math.ceil(math.prod(shape) / block)] * (2 if nested else 0)
    return [
        *(torch.empty(count, device="meta") for count in scales),
        torch.empty(math.prod(shape), dtype=x.dtype, device="meta"),
    ]


def _coded_product(x: Tensor, codes: Tensor, shape: Sequence[int], *_: Any, out_val: Any, **__: Any) -> int:
    return 2 * x.numel() * shape[0]


def _attention(*args: Any, out_val: Any, **_: Any) -> Any:
    return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))  # type: ignore[no-untyped-call]


def _attention_backward(*args: Any, out_val: Any, **_: Any) -> Any:
    return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))  # type: ignore[no-untyped-call]


_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all storages that operations make while they live, and the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.made = 0, 0
        self.events: array[int] = array("q")
        self.recorded = bytearray()
        self._known: dict[int, weakref.ref[Any]] = {}
        self.restart()

    def restart(self) -> None:
        """Count anew, from the bytes that are alive now."""
        self.peak, self.operations = self.alive, 0
        self.products: set[Any] = set()
        self.work: dict[Call, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = False
        if func is _ATEN.add.Tensor and isinstance(args[0], Tensor) and (frame := _caller()) is not None:
            masked = _is_mask(frame, *args[:2])
            if masked or (frame.f_code is _ENGINE and _is_summed_in_place(args[0])):
                func = _ATEN.add_.Tensor
        packet, coded = func._overloadpacket, func._schema.name == _CODED
        inside = _decoded(args) if coded else []
        if packet is _ATEN._safe_softmax:  # looks for rows that are masked whole
            inside = [torch.empty(args[0].shape, dtype=torch.bool, device="meta")]
        for tensor in inside:
            self.add(tensor)
        made = func(*args, **kwargs)
        if masked:
            made = _ATEN.alias.default(made)  # autograd takes the result for another tensor
        formula = _coded_product if coded else _FORMULAS.get(packet)
        count = 0 if formula is None else int(formula(*args, **kwargs, out_val=made))
        self.operations += count
        if (coded or packet in _PRODUCTS) and made.itemsize == 2:
            self.products.add(
                (func, *((tuple(each.shape), each.stride()) for each in args if isinstance(each, Tensor)))
            )
        read = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        recorded = torch._C._current_graph_task_id() != -1 or (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)
        )
        written = [each for each in tree_iter(made) if isinstance(each, Tensor)]
        new = [self.add(tensor, recorded) for tensor in written]
        if any(new) or func._schema.is_mutable:  # not a view
            taken = () if formula else (*(written if packet in _LOOKUPS else read), *written)
            moved = sum(tensor.nbytes for tensor in (*taken, *inside))
            single = packet is _ATEN.bmm and args[0].shape[0] == 1  # no heads: a vector by the output layer
            square = formula is not None and not coded and not single and packet not in _LINEAR
            self.work.setdefault(Call.of(func, args, kwargs), Work(0, count, square, moved)).times += 1
        self.peak = max(self.peak, self.alive)
        return made

    def add(self, tensor: Tensor, recorded: bool = False) -> bool:
        """Count the storage of a tensor, any shape, unless it is known; return True if it was not."""
        storage = tensor.untyped_storage()
        number = id(storage)
        if (known := self._known.get(number)) is not None and known() is storage:
            return False
        size = storage.nbytes()
        self.made += 1
        self.alive += size
        self.events.append(size)
        self.recorded.append(recorded)
        self._known[number] = weakref.ref(storage, self._forgetting(number, size, self.made))
        return True

    def _forgetting(self, number: int, size: int, made: int) -> Any:
        def forget(_: Any) -> None:
            self._known.pop(number, None)
            self.alive -= size
            self.events.append(-made)

        return forget
