"""Memory-efficient frozen modules: they save only what backward cannot recompute.

While a model has adapters, its norms, activation functions and gated feed-forward blocks get another class (same
object, as adapted layers do: docs/decisions/0001) whose forward gives the same and stores less:

* a norm stores its input, and how its output is made again is noted (`recompute`), so that the adapted layers that read
  it do not store it a second time; an RMS norm is one node in place of the six that its Python forward makes;
* an activation function stores its input alone, however many steps it is written in;
* act(gate) * up stores gate and up; what goes into the last layer of the block is made again from them.

The modules are known by their class, in the tables below; all others keep their own forward. tests/kernels holds each
entry of the tables against its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftwerk.kernels.recompute import ActivationTable, is_eager
from graftwerk.methods.placement import OFFLOAD_HOOK

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

OWN = "_graftwerk_own"
"""Attribute of a memory-efficient class: the class that the module had."""
ACTIVATIONS = "_graftwerk_activations"
"""Attribute of a memory-efficient module: the `ActivationTable` of its model."""

FAMILIES = {
    "cohere": "Cohere", "cohere2": "Cohere2", "cwm": "Cwm", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
    "diffllama": "DiffLlama", "ernie4_5": "Ernie4_5", "exaone4": "Exaone4", "falcon_h1": "FalconH1",
    "flex_olmo": "FlexOlmo", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3", "glm": "Glm", "glm4": "Glm4",
    "glm4_moe": "Glm4Moe", "gpt_oss": "GptOss", "granite": "Granite", "granitemoe": "GraniteMoe", "helium": "Helium",
    "jamba": "Jamba", "llama": "Llama", "ministral": "Ministral", "ministral3": "Ministral3", "mistral": "Mistral",
    "mixtral": "Mixtral", "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "olmoe": "Olmoe", "phi3": "Phi3",
    "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen3_next": "Qwen3Next",
    "seed_oss": "SeedOss", "smollm3": "SmolLM3", "stablelm": "StableLm", "vaultgemma": "VaultGemma", "zamba": "Zamba",
}  # fmt: skip
"""Families of transformers whose classes are known, and what the names of these classes begin with."""
RMS_NORMS = frozenset(
    {f"{family}.{prefix}RMSNorm" for family, prefix in FAMILIES.items()}
    | {"t5.T5LayerNorm", "mt5.MT5LayerNorm", "umt5.UMT5LayerNorm", "longt5.LongT5LayerNorm", "mamba.MambaRMSNorm"}
)
"""Classes that compute x / rms(x) * weight, or * (1 + weight): those of `OFFSET_FAMILIES`."""
OFFSET_FAMILIES = frozenset({"gemma", "gemma2", "gemma3", "qwen3_next", "vaultgemma"})
GATED_MLPS = frozenset(
    f"{family}.{prefix}MLP"
    for family, prefix in FAMILIES.items()
    if family not in {"falcon_h1", "glm", "glm4", "gpt_oss", "granitemoe", "mixtral", "phi3", "seed_oss"}
)
"""Classes that compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "none", "GELUTanh": "tanh",
         "NewGELUActivation": "tanh"}  # fmt: skip
"""Activation functions by class name: silu, or the approximation of gelu. (`gelu_python` and the like are others.)"""
LONG_ACTIVATIONS = frozenset(
    {"NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation"}
)
"""Activation functions written in several steps, each of which would store a tensor."""


# -- norms -----------------------------------------------------------------------------------------------------------


class RMSNormFunction(torch.autograd.Function):
    """RMS norm as one node: y = x / sqrt(mean(x^2) + eps) * weight, in float32.

    x is (..., d), weight (d,) frozen; 1/sqrt(...), (..., 1), is returned too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return y (..., d) and 1 / rms (..., 1) for x (..., d) and weight (d,)."""
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        """Return the gradient for x (..., d) from that for y (..., d)."""
        x, weight, inverse = ctx.saved_tensors
        g = grad * weight
        projection = (g * x).mean(-1, keepdim=True).mul_(inverse**3)
        return g.mul_(inverse).addcmul_(x, projection, value=-1), None, None


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


class MemoryEfficientRMSNorm(_Module):
    """Mixin before a class that computes x / rms(x) * weight, or * (1 + weight)."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the norm of x (..., d), (..., d), and note how it is recomputed."""
        (x,) = args or kwargs.values()
        weight = self.weight
        assert isinstance(weight, Tensor)
        if weight.requires_grad or not x.requires_grad or not is_eager(x):
            return super().forward(x)  # type: ignore[no-any-return]
        if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            # Families round at different steps; only their own forward rounds as they do.
            return _remember_call(self, super().forward, x)
        factor = weight + 1 if _name(getattr(type(self), OWN)).partition(".")[0] in OFFSET_FAMILIES else weight
        y, inverse = RMSNormFunction.apply(x, factor, _eps(self))  # type: ignore[no-untyped-call]
        return _activations(self).remember(y, _scaled, x, inverse, factor)


class MemoryEfficientLayerNorm(_Module):
    """Mixin before `nn.LayerNorm`, which stores only its input and two numbers a row as it is."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the norm of x (..., d), (..., d), and note how it is recomputed."""
        (x,) = args or kwargs.values()
        if OFFLOAD_HOOK in self.__dict__ or any(
            parameter.requires_grad for parameter in self.parameters(recurse=False)
        ):
            # An offloaded weight is no longer there when backward computes the output again.
            return super().forward(x)  # type: ignore[no-any-return]
        return _remember_call(self, super().forward, x)


def _eps(norm: nn.Module) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    return float(torch.finfo(torch.float32).eps if eps is None else eps)  # torch's RMSNorm has no eps by default


def _remember_call(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run the module's own forward and note that it is recomputed under the same autocast."""
    return _activations(module).remember(forward(x), _under_this_autocast(forward, x), x)


def _under_this_autocast(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that backward, where autocast is off, computes as ``forward`` of x (...) is computed now."""
    device, enabled = x.device.type, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(device) if enabled else None

    def again(x_again: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return forward(x_again)

    return again


# -- activation functions and gated blocks ---------------------------------------------------------------------------


class ActivationFunction(torch.autograd.Function):
    """An elementwise function written in several steps: stores its input, and repeats the steps in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor]) -> Tensor:
        """Return function(x), (...), for x (...); ``again`` is the same function as backward calls it."""
        ctx.save_for_backward(x)
        ctx.function = again
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient for x (...) from that for the output (...)."""
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        return grad_x, None, None


class MemoryEfficientActivation(_Module):
    """Mixin before the class of an elementwise function without parameters."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the activation of x (...), (...), and note how it is recomputed."""
        (x,) = args or kwargs.values()
        own = super().forward
        if not x.requires_grad or not is_eager(x):
            return own(x)  # type: ignore[no-any-return]
        if getattr(type(self), OWN).__name__ in LONG_ACTIVATIONS:
            again = _under_this_autocast(own, x)
            y = ActivationFunction.apply(x, own, again)  # type: ignore[no-untyped-call]
            return _activations(self).remember(y, again, x)
        return _remember_call(self, own, x)


class GatedProductFunction(torch.autograd.Function):
    """act(gate) * up as one node; ``kind`` as in `GATES`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        """Return act(gate) * up, (..., m), for gate and up (..., m)."""
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(kind, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients for gate and up (..., m) from that for their product (..., m)."""
        gate, up = ctx.saved_tensors
        grad_gate = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_product = grad * up
            if ctx.kind == "silu":
                grad_gate = torch.ops.aten.silu_backward(grad_product, gate)
            else:
                grad_gate = torch.ops.aten.gelu_backward(grad_product, gate, approximate=ctx.kind)
        if ctx.needs_input_grad[1]:
            grad_up = _act(ctx.kind, gate).mul_(grad)
        return grad_gate, grad_up, None


def _act(kind: str, gate: Tensor) -> Tensor:
    return nn.functional.silu(gate) if kind == "silu" else nn.functional.gelu(gate, approximate=kind)


def _gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    return _act(kind, gate).mul_(up)


_SILU, _GELU, _TANH = (lambda gate, up, kind=kind: _gated(kind, gate, up) for kind in ("silu", "none", "tanh"))
_AGAIN: dict[str, Callable[..., Tensor]] = {"silu": _SILU, "none": _GELU, "tanh": _TANH}


def gated(act: nn.Module, gate: Tensor, up: Tensor, activations: ActivationTable) -> Tensor:
    """Return act(gate) * up, (..., m), for gate and up (..., m)."""
    kind = _kind(act)
    if kind is None or not is_eager(gate) or not (gate.requires_grad or up.requires_grad) or gate.dtype != up.dtype:
        return act(gate) * up  # type: ignore[no-any-return]
    y = GatedProductFunction.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return activations.remember(y, _AGAIN[kind], gate, up)


def _kind(act: nn.Module) -> str | None:
    own = getattr(type(act), OWN, type(act))
    written_out = getattr(getattr(act, "act", None), "__name__", "").endswith("_python")
    inplace = getattr(act, "inplace", False)
    return None if written_out or inplace or act._forward_hooks or act._forward_pre_hooks else GATES.get(own.__name__)


class MemoryEfficientGatedMLP(_Module):
    """Mixin before the gated feed-forward of Llama and its relatives."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return down_proj(act(gate_proj(x)) * up_proj(x)), (..., d), for x (..., d)."""
        (x,) = args or kwargs.values()
        return self.down_proj(  # type: ignore[no-any-return, operator]
            gated(self.act_fn, self.gate_proj(x), self.up_proj(x), _activations(self))  # type: ignore[operator, arg-type]
        )


# -- which module gets what ------------------------------------------------------------------------------------------


def efficient_mixin(module: nn.Module) -> type[nn.Module] | None:
    """Return the mixin for the class of a module of the base, or None if it keeps its own."""
    cls: Any = type(module)
    if "forward" in module.__dict__ or hasattr(cls, OWN) or hasattr(cls, "_graftwerk_base"):
        return None
    if cls is nn.LayerNorm:
        return MemoryEfficientLayerNorm
    if _name(cls) in RMS_NORMS:
        return MemoryEfficientRMSNorm if module._parameters.get("weight") is not None else None
    if cls.__name__ in GATES or cls.__name__ in LONG_ACTIVATIONS:
        return None if getattr(module, "inplace", False) else MemoryEfficientActivation
    return MemoryEfficientGatedMLP if _name(cls) in GATED_MLPS else None


@cache
def _name(cls: type) -> str:
    """Return ``llama.LlamaRMSNorm`` for a class of transformers' models, or the module's name for other classes."""
    parts = cls.__module__.split(".")
    known = parts[:2] == ["transformers", "models"] and len(parts) == 4 and parts[3] == f"modeling_{parts[2]}"
    return f"{parts[2]}.{cls.__name__}" if known else cls.__module__


def own_base(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before it became adapted or memory-efficient."""
    own: type[nn.Module] = getattr(cls, "_graftwerk_base", getattr(cls, OWN, cls))
    return own


def _activations(module: Any) -> ActivationTable:
    table: ActivationTable = module.__dict__[ACTIVATIONS]
    return table
