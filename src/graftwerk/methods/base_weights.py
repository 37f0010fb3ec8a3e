"""The weight of a base module as numbers: transposed, quantized, offloaded and parametrized ones included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graftwerk.errors import UnsupportedError
from graftwerk.methods.placement import OFFLOAD_HOOK, onloaded

PLAIN_TYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Types whose numbers mean what they say. An 8-bit one is scaled by numbers that are stored elsewhere."""


def base_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, detached: GPT-2's `Conv1D` is transposed, a 4- or 8-bit one dequantized.

    Returns:
        (out, in).

    Raises:
        UnsupportedError: it is quantized in a format that is not known here, or spread over processes.
    """
    weight = _stored_weight(module)
    if weight.is_meta and OFFLOAD_HOOK in module.__dict__:
        with onloaded(module):
            return base_weight(module)
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).detach()  # type: ignore[no-any-return]
    if is_quantized(weight):
        scale = getattr(weight, "SCB", None)
        if scale is None:
            scale = getattr(getattr(module, "state", None), "SCB", None)  # where the first pass moves it
        if weight.dtype != torch.int8 or not isinstance(scale, Tensor):
            raise UnsupportedError(f"the weights of this {type(module).__name__} are codes that cannot be read here")
        return weight.detach().float() * (scale.to(weight.device)[:, None] / 127)
    if weight.dtype not in PLAIN_TYPES or is_traceable_wrapper_subclass(weight):
        raise UnsupportedError(
            f"the weights of this {type(module).__name__} are {weight_type(weight)}, which cannot be read here",
            hint="use a method that does not read them (plain lora, ia3, bottleneck), or load the base in bfloat16",
        )
    return weight.detach().T if is_transposed(module) else weight.detach()


def _stored_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight (out, in) as it is stored, without the adapters that an adapted layer may show in it."""
    weight = module._parameters.get("weight")
    if weight is None:  # computed from others, by a parametrization
        weight = module.weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    return weight


def is_plain(weight: Tensor) -> bool:
    """Return True if a weight, any shape, is one of torch's own tensors, dense and of a type in `PLAIN_TYPES`.

    Subclasses (DTensor, torchao's) may hold a part, or codes, and answer for the whole. A fake tensor stands for a
    plain one: what is planned without values is what runs with them.
    """
    exact = type(weight) in (nn.Parameter, Tensor, FakeTensor)
    return exact and weight.dtype in PLAIN_TYPES and weight.layout is torch.strided


def weight_type(weight: Tensor) -> str:
    """Return the class and type of a weight, any shape, for messages."""
    return f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"


def is_quantized(weight: Tensor) -> bool:
    """Return True if a weight, any shape, holds codes (bitsandbytes' 4 or 8 bits) and not numbers to compute with."""
    return hasattr(weight, "quant_state") or not weight.is_floating_point()


def is_coded(weight: Tensor) -> bool:
    """Return True if a weight, any shape, is no numbers to train or copy: quantized, FP8, torchao's; not a DTensor."""
    wrapped = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "placements")
    return is_quantized(weight) or weight.dtype not in PLAIN_TYPES or wrapped


def is_transposed(module: nn.Module) -> bool:
    """Return True if a layer stores its weight as (in, out), as transformers' `Conv1D` does."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def all_finite(tensor: Tensor) -> bool:
    """Return True if no number of a tensor, any shape, is NaN or infinite.

    Looks at the least and the greatest, in one pass and without a temporary tensor if this one is contiguous.
    `isfinite` allocates one and a half times the tensor, and takes twenty times as long.

    Example:
        >>> all_finite(torch.tensor([1.0, float("nan")]))
        False
    """
    if tensor.numel() == 0:
        return True
    numbers = tensor.detach()
    if is_traceable_wrapper_subclass(numbers) or numbers.dtype.itemsize == 1:  # DTensor and the like; 8-bit types
        return bool(torch.isfinite(numbers.float() if numbers.dtype.itemsize == 1 else numbers).all())
    low, high = torch.aminmax(numbers)
    return bool(low.isfinite() & high.isfinite())  # NaN propagates to both
