"""Frozen modules that keep for backward only what cannot be made again.

While a model has grafts, its norms, activation functions and gated feed-forward blocks get another class (same object,
as adapted layers do: docs/decisions/0001) whose forward gives the same and keeps less:

* a norm keeps its input, and its output carries a recipe (`methods.sharing`), so that the adapted layers that read it
  do not keep it a second time; an RMS norm is one node in place of the six that its Python forward makes;
* an activation function keeps its input alone, however many steps it is written in;
* act(gate) * up keeps gate and up; what goes into the last layer of the block is made again from them.

Which classes: known by name, and then by what they do. RMS norms are run on random numbers and compared with the
formula; a gated block is known by the one line that it consists of. All others keep their own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftwerk.inject.hooks import HOOKED, SwappedClass, change_class, swapped_class
from graftwerk.methods.sharing import possible, remember

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_OWN = "_graftwerk_own"
"""On a frugal class: the class that the module had."""

_GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "none", "GELUTanh": "tanh",
          "NewGELUActivation": "tanh"}  # fmt: skip
"""Activation functions by class name: silu, or the approximation of gelu. (`gelu_python` and the like are others.)"""
_LONG = frozenset({"NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation"})
"""Activation functions written in several steps, each of which would keep a tensor."""


# -- norms -----------------------------------------------------------------------------------------------------------


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight in float32, weight (d,) frozen; also gives 1/sqrt(...), (..., 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        g = grad * weight
        along = (g * x).mean(-1, keepdim=True).mul_(inverse**3)
        return g.mul_(inverse).addcmul_(x, along, value=-1), None, None


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


class FrugalRMSNorm(SwappedClass, _Module):
    """Mixed in before a class that computes x / rms(x) * weight, or * (1 + weight)."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        weight = self.weight
        assert isinstance(weight, Tensor)
        if weight.requires_grad or not x.requires_grad or not possible(x):
            return super().forward(x)  # type: ignore[no-any-return]
        if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            # The families round at different places; their own forward does it as they do.
            return _remembered(self, super().forward, x)
        factor = weight + 1 if type(self)._graftwerk_offset else weight  # type: ignore[attr-defined]
        y, inverse = RMSNormFunction.apply(x, factor, _eps(self))  # type: ignore[no-untyped-call]
        return remember(y, _scaled, x, inverse, factor)


class FrugalLayerNorm(SwappedClass, _Module):
    """Mixed in before `nn.LayerNorm`, which keeps its input and two numbers a row already."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        if HOOKED in self.__dict__ or any(parameter.requires_grad for parameter in self.parameters(recurse=False)):
            # An offloaded weight is no longer there when backward computes the output again.
            return super().forward(x)  # type: ignore[no-any-return]
        return _remembered(self, super().forward, x)


def _eps(norm: nn.Module) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    return float(torch.finfo(torch.float32).eps if eps is None else eps)  # torch's RMSNorm has none by default


def _remembered(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The module's own forward, made again under the same autocast."""
    y = forward(x)
    device, enabled = x.device.type, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(device) if enabled else None

    def again(kept: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return forward(kept)

    return remember(y, again, x)


# -- activation functions and gated blocks ---------------------------------------------------------------------------


class LongActivation(torch.autograd.Function):
    """An elementwise function written in several steps: keeps its input, and goes through the steps again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        return grad_x, None


class FrugalActivation(SwappedClass, _Module):
    """Mixed in before the class of an elementwise function without parameters."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        own = super().forward
        if not x.requires_grad or not possible(x):
            return own(x)  # type: ignore[no-any-return]
        if type(self)._graftwerk_own.__name__ in _LONG:  # type: ignore[attr-defined]
            return remember(LongActivation.apply(x, own), own, x)  # type: ignore[no-untyped-call]
        return _remembered(self, own, x)


class GatedProduct(torch.autograd.Function):
    """act(gate) * up; ``kind`` as in `_GATES`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(kind, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        grad_gate = grad_up = None
        if ctx.needs_input_grad[0]:
            outer = grad * up
            if ctx.kind == "silu":
                grad_gate = torch.ops.aten.silu_backward(outer, gate)
            else:
                grad_gate = torch.ops.aten.gelu_backward(outer, gate, approximate=ctx.kind)
        if ctx.needs_input_grad[1]:
            grad_up = _act(ctx.kind, gate).mul_(grad)
        return grad_gate, grad_up, None


def _act(kind: str, gate: Tensor) -> Tensor:
    return nn.functional.silu(gate) if kind == "silu" else nn.functional.gelu(gate, approximate=kind)


def _gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    return _act(kind, gate).mul_(up)


_SILU, _GELU, _TANH = (lambda gate, up, kind=kind: _gated(kind, gate, up) for kind in ("silu", "none", "tanh"))
_AGAIN: dict[str, Callable[..., Tensor]] = {"silu": _SILU, "none": _GELU, "tanh": _TANH}


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up."""
    kind = _kind(act)
    if kind is None or not possible(gate) or not (gate.requires_grad or up.requires_grad) or gate.dtype != up.dtype:
        return act(gate) * up  # type: ignore[no-any-return]
    return remember(GatedProduct.apply(gate, up, kind), _AGAIN[kind], gate, up)  # type: ignore[no-untyped-call]


def _kind(act: nn.Module) -> str | None:
    own = getattr(type(act), _OWN, type(act))
    written_out = getattr(getattr(act, "act", None), "__name__", "").endswith("_python")
    inplace = getattr(act, "inplace", False)
    return None if written_out or inplace or act._forward_hooks or act._forward_pre_hooks else _GATES.get(own.__name__)


class FrugalGated(SwappedClass, _Module):
    """Mixed in before the feed-forward of the Llama kind."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        return self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return, operator, arg-type]


_LINE = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"


# -- which module gets what ------------------------------------------------------------------------------------------


@cache
def _is_gated(cls: Any) -> bool:
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False
    body = "".join(source.partition(":")[2].split())
    return body in (f"down_proj={_LINE}returndown_proj", f"return{_LINE}")


@torch.no_grad()
def _rms_offset(norm: nn.Module) -> bool | None:
    """Whether its factor is weight + 1; None: it is no RMS norm that is known."""
    weight, eps = norm._parameters.get("weight"), _eps(norm)
    if weight is None or weight.dim() != 1 or len(norm._parameters) != 1 or weight.device.type == "meta" or not eps:
        return None
    x = torch.randn(2, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device)
    try:
        y = norm.forward(x).float()
    except (RuntimeError, TypeError, ValueError):
        return None
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    close = 1e-5 if weight.dtype is torch.float32 else 2e-2
    for offset in (False, True):
        if torch.allclose(y, unit * (weight.float() + offset), rtol=close, atol=close):
            return offset
    return None


def _frugal_class(own: Any, mixin: Any, offset: bool) -> type[nn.Module]:
    return swapped_class(mixin, own, _graftwerk_offset=offset)  # type: ignore[no-any-return]


def _frugal(module: nn.Module) -> type[nn.Module] | None:
    cls: Any = type(module)
    if "forward" in module.__dict__ or hasattr(cls, _OWN) or hasattr(cls, "_graftwerk_base"):
        return None
    if cls is nn.LayerNorm:
        return _frugal_class(cls, FrugalLayerNorm, False)
    if cls.__name__.endswith(("RMSNorm", "T5LayerNorm")):
        offset = _rms_offset(module)
        return None if offset is None else _frugal_class(cls, FrugalRMSNorm, offset)
    if cls.__name__ in _GATES or cls.__name__ in _LONG:
        return None if getattr(module, "inplace", False) else _frugal_class(cls, FrugalActivation, False)
    return _frugal_class(cls, FrugalGated, False) if _is_gated(cls) else None


def make_frugal(modules: Iterable[nn.Module]) -> None:
    """Give each of these modules of a base that is known its frugal class. Done twice, it changes nothing more."""
    for module in modules:
        if (cls := _frugal(module)) is not None:
            change_class(module, cls)


def give_back(modules: Iterable[nn.Module]) -> None:
    """Give every one its own class back."""
    for module in modules:
        own_class(module)


def own_base(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before it became adapted or frugal."""
    own: type[nn.Module] = getattr(cls, "_graftwerk_base", getattr(cls, _OWN, cls))
    return own


def own_class(module: nn.Module) -> None:
    """Give one module its own class back, if it is frugal."""
    change_class(module, getattr(type(module), _OWN, type(module)))
