"""Checks of the layers that an adapter can work in: by class and parent, and for unknown classes by their outputs.

An adapter sees a layer's input and output. That is the whole layer only if its forward is called and is
``x W^T + b``; a bias can be trained as an offset only if it is added to the last dimension of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from graftwerk.kernels.memory_efficient import own_base
from graftwerk.modeling.adapter_slots import CHILD

T = TypeVar("T")

_NOT_CALLED: dict[str, tuple[str, ...]] = {
    "MultiheadAttention": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
}
"""Children of a class (or of one derived from it) whose weights it reads without calling them."""

_KNOWN_LINEAR = ("torch", "bitsandbytes", "graftwerk")
"""Packages whose linear layers compute x W^T + b, quantized or not."""


def is_weight_only(parent: nn.Module, name: str) -> bool:
    """Return True if a module reads the weights of its child ``name`` and never calls it."""
    return any(name in _NOT_CALLED.get(cls.__name__, ()) for cls in type(parent).__mro__)


def unfit(module: nn.Module) -> str | None:
    """Return the reason why no adapter works in a linear layer (an `nn.Linear` or `Conv1D`), or None if one does."""
    own = own_base(type(module))
    if own.forward in (nn.Linear.forward, Conv1D.forward) or own.__module__.split(".")[0] in _KNOWN_LINEAR:
        return None
    return None if _is_linear(module) else f"its class {own.__name__} computes something else than x W^T + b"


def _with_values(check: Callable[[Any], T]) -> Callable[[Any], T]:
    """Let a check try tensors that have values, also where a model is planned on tensors without."""

    @wraps(check)
    def checked(module: Any) -> T:
        with _disable_current_modes():
            return check(module)

    return checked


@_with_values
def embedding_unfit(module: nn.Embedding) -> str | None:
    """Return the reason why no row of an embedding can be adapted, or None if it returns rows, times `embed_scale`."""
    own = own_base(type(module))
    if module.max_norm is not None:
        return "it changes its own weight while it is called (max_norm)"
    if own.forward is nn.Embedding.forward:
        return None
    factor = getattr(module, "embed_scale", 1.0)
    if isinstance(factor, Tensor) and (factor.is_meta or type(factor).__name__ == "FakeTensor"):
        return None  # a dry run: the weights, and this factor, are loaded later
    draw = torch.Generator("cpu").manual_seed(0)
    ids, weight = torch.tensor([[0, 5, 3]], device="cpu"), torch.randn(6, 4, generator=draw, device="cpu")
    buffers = {name: None if one is None else one.cpu() for name, one in module._buffers.items()}
    y = _try(module, ids, {"weight": weight}, _buffers=buffers, num_embeddings=6, embedding_dim=4, padding_idx=None)
    expected = weight[ids] * (factor.cpu() if isinstance(factor, Tensor) else factor)  # (1, 3, 4)
    if y is not None and y.shape == expected.shape and torch.allclose(y.float(), expected.float(), rtol=1e-2):
        return None
    return f"its class {own.__name__} computes something else than its rows, times `embed_scale`"


@_with_values
def adds_bias_last(module: nn.Module) -> bool:
    """Return True if a module's bias (d,) is added to the last dimension of its output (..., d), whatever comes before.

    Linear layers and plain layer norms are known; other modules without children are tried on random numbers.
    """
    own = own_base(type(module))
    if own.forward in (nn.Linear.forward, Conv1D.forward, nn.LayerNorm.forward):
        return True
    if isinstance(module, nn.Linear):
        return unfit(module) is None
    bias = module._parameters.get("bias")
    if bias is None or bias.dim() != 1 or not _is_leaf(module):
        return False
    d = bias.shape[0]
    draw = torch.Generator("cpu").manual_seed(0)
    parameters = {
        name: torch.randn(one.shape, generator=draw, device="cpu")
        for name, one in module._parameters.items()
        if one is not None
    }
    # (1, T, d) with T != d, so that a norm over another dimension fails or gives something else.
    x = torch.randn(1, 3 if d != 3 else 5, d, generator=draw, device="cpu")
    offset = torch.randn(d, generator=draw, device="cpu")
    before = _try(module, x, parameters)
    after = _try(module, x, parameters | {"bias": parameters["bias"] + offset})
    if before is None or after is None or before.shape != x.shape or after.shape != x.shape:
        return False
    return torch.allclose(after - before, offset.expand_as(x), rtol=1e-4, atol=1e-4)


@_with_values
def _is_linear(module: nn.Module) -> bool:
    """Try a linear layer's own forward on a small weight (6, 4) in place of its own."""
    if not _is_leaf(module):
        return False
    draw = torch.Generator("cpu").manual_seed(0)
    x, weight = torch.randn(2, 4, generator=draw, device="cpu"), torch.randn(6, 4, generator=draw, device="cpu")
    bias = None if module._parameters.get("bias") is None else torch.randn(6, generator=draw, device="cpu")
    y = _try(module, x, {"weight": weight, "bias": bias}, in_features=4, out_features=6)
    return y is not None and y.shape == (2, 6) and torch.allclose(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def _is_leaf(module: nn.Module) -> bool:
    return all(child is None or name == CHILD for name, child in module._modules.items())


@torch.no_grad()
def _try(module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor | None], **attributes: Any) -> Tensor | None:
    """Run a shallow copy of a module on other parameters; return None if it fails or returns no tensor."""
    twin = copy.copy(module)
    twin.__class__ = own_base(type(module))
    twin.__dict__.pop("forward", None)
    twin.__dict__.update(_parameters=dict(parameters), _modules={}, training=False, **attributes)
    try:
        y = twin.forward(x)
    except Exception:  # whatever a foreign forward raises on this input, it is not the layer that is looked for
        return None
    return y if isinstance(y, Tensor) else None
