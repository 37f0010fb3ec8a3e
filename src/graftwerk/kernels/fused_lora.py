"""A linear layer and its active LoRAs in one autograd node.

The plain path costs little arithmetic and much memory traffic: each adapted layer stores its input, a dropped copy of
it, the mask and several thin intermediates, adds whole outputs and gradients out of place, and multiplies in orders
that suit no GEMM kernel. Here

* the input is stored once, or not at all if it can be recomputed from stored tensors (`recompute.Recompute`);
* the dropout mask is drawn again from its seed (`methods.dropout`), once for all layers that read the same tensor;
* sums happen in place, scales act on the thin side, and the thin side comes first in a product: (r, N), not (N, r);
* nothing is stored for a quantized base: it is dequantized in forward by its own kernel, and in backward once more.

Legend: N rows times tokens, i inputs, o outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftwerk.kernels import flags
from graftwerk.kernels.recompute import ActivationTable, Recompute, SharedInput
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.base_weights import base_weight, is_plain, is_quantized, is_transposed
from graftwerk.methods.dora import DoRAModule
from graftwerk.methods.dropout import mask_bits
from graftwerk.methods.lora import LoRAModule
from graftwerk.methods.low_rank import LowRankModule
from graftwerk.methods.pissa import PiSSAModule

_NOTHING: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """One term ``scale`` B A x, on a dropped x if ``p`` is not 0.

    Attributes:
        a: A, (r, i).
        b: B, (o, r).
        scale: Factor on the product.
        p: Probability of dropping an entry of x.
        seed: Seed of the mask.
    """

    a: Tensor
    b: Tensor
    scale: float
    p: float = 0.0
    seed: int = 0

    @property
    def factor(self) -> float:
        """The scale times dropout's own, 1 / (1 - p)."""
        return self.scale / (1 - self.p)


class FusedLoRA:
    """The kernel of `LoRAModule` and `PiSSAModule`: a linear layer and all of its active LoRAs."""

    def supports(self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor) -> bool:
        """Return True if all adapters are LoRA or PiSSA and the layer, which reads x (..., i), can be fused."""
        return all(type(adapter) in (LoRAModule, PiSSAModule) for adapter in adapters) and can_fuse(layer, x)

    def __call__(
        self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor, activations: ActivationTable
    ) -> Tensor:
        """Return layer(x) and the adapters' updates, (..., o), for x (..., i)."""
        terms = [term for adapter in adapters if isinstance(adapter, LowRankModule) for term in lora_terms(adapter, x)]
        return fused_linear(layer, x, terms, activations)


class FusedDoRA:
    """The kernel of `DoRAModule`: the direction is one node; the magnitude needs it whole in backward."""

    def supports(self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor) -> bool:
        """Return True if there is one DoRA alone and the layer, which reads x (..., i), can be fused with it."""
        return len(adapters) == 1 and can_fuse(layer, x, bias=False) and not torch.is_autocast_enabled(x.device.type)

    def __call__(
        self, layer: nn.Module, adapters: Sequence[AdapterModule], x: Tensor, activations: ActivationTable
    ) -> Tensor:
        """Return m / ||W + s B A|| * (W x + s B A x) + bias, (..., o), for x (..., i)."""
        (dora,) = adapters
        assert isinstance(dora, DoRAModule)
        seed = dora.seed(x) if dora.p else 0
        term = LowRankTerm(dora.lora_A.weight, dora.lora_B.weight, dora.scale, dora.p, seed)
        direction = fused_linear(layer, x, [term], activations, bias=False)  # (..., o)
        ratio, bias = dora.magnitude_ratio(), layer.bias
        out = ratio * direction if bias is None else torch.addcmul(bias, ratio, direction)  # type: ignore[arg-type]
        return out.to(direction.dtype)


def lora_terms(lora: LowRankModule, x: Tensor) -> list[LowRankTerm]:
    """Return the terms that a LoRA adds to a layer that reads ``x`` (..., i); the seed of its mask is drawn here."""
    seed = lora.seed(x) if lora.p else 0
    terms = [LowRankTerm(lora.lora_A.weight, lora.lora_B.weight, lora.scale, lora.p, seed)]
    if isinstance(lora, PiSSAModule):
        terms.append(LowRankTerm(lora.start_A, lora.start_B, -lora.scale, lora.p, seed))
    return terms


def merge_lora_(lora: LoRAModule, weight: Tensor) -> bool:
    """Add s B A to ``weight`` (o, i) in place and return True, or return False if it would be rounded twice."""
    a, b = lora.lora_A.weight, lora.lora_B.weight
    if a.dtype != weight.dtype:
        return False
    weight.addmm_(b, a, alpha=lora.scale)
    return True


def can_fuse(layer: nn.Module, x: Tensor, *, bias: bool = True) -> bool:
    """Return True if `fused_linear` may run.

    It may on a frozen `nn.Linear` or transformers' `Conv1D` with plain weights, bitsandbytes' `Linear4bit` or the
    `Linear8bit` of `modeling.quantize`, run eagerly on a plain tensor on the same device.

    Args:
        layer: An adapted layer.
        x: (..., i).
        bias: True if the layer's bias is to be added.
    """
    base: type = getattr(type(layer), "_graftwerk_base", type(layer))
    weight, vector = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    if not flags.enabled("fused") or not is_plain(x):
        return False
    if not x.is_floating_point() or weight.device != x.device:
        return False
    if weight.requires_grad or (isinstance(vector, Tensor) and vector.requires_grad):
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    if is_quantized(weight):  # its own kernel adds the bias
        known = base.__name__ == "Linear8bit" or getattr(weight, "quant_state", None) is not None
        return known and base.__name__ in ("Linear4bit", "Linear8bit") and bias
    if not is_plain(weight) or (isinstance(vector, Tensor) and not is_plain(vector)):
        return False
    return (base is nn.Linear or base.__name__ == "Conv1D") and (autocast or weight.dtype == x.dtype)


def fused_linear(
    layer: nn.Module, x: Tensor, terms: Sequence[LowRankTerm], activations: ActivationTable, *, bias: bool = True
) -> Tensor:
    """Return layer(x) plus the terms; requires `can_fuse`.

    Args:
        layer: An adapted layer.
        x: (..., i).
        terms: Low-rank products to add.
        activations: The table of the model's living activations.
        bias: True if the layer's bias is added.

    Returns:
        (..., o).
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    compute = torch.get_autocast_dtype(x.device.type) if autocast else terms[0].a.dtype
    factors = [tensor for term in terms for tensor in (term.a, term.b)]
    noted = activations.shared(x), activations.recipe(x)
    y: Tensor = LoRALinear.apply(  # type: ignore[no-untyped-call]
        x, layer, layer.weight, layer.bias if bias else None, terms, compute, autocast, noted, *factors
    )
    return y


def _base_forward(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, autocast: torch.dtype | None
) -> Tensor:
    """Return the base output (..., o): fresh, contiguous and no view, so that the caller may change it in place."""
    if is_quantized(weight):
        x = x if autocast is None else x.to(autocast)  # its own layer answers in the type of its input
        y: Tensor = type(layer)._graftwerk_base.forward(layer, x)  # type: ignore[attr-defined]
        return y.clone(memory_format=torch.contiguous_format) if y._is_view() or not y.is_contiguous() else y
    if autocast is not None:
        x, weight, bias = x.to(autocast), weight.to(autocast), None if bias is None else bias.to(autocast)
    y = x.new_empty(*x.shape[:-1], out_features)
    flat, rows = y.view(-1, out_features), x.reshape(-1, x.shape[-1])
    turned = weight if is_transposed(layer) else weight.T
    if bias is None:
        torch.mm(rows, turned, out=flat)
    else:
        torch.addmm(bias, rows, turned, out=flat)
    return y


class LoRALinear(torch.autograd.Function):
    """The node: y = W x + bias + terms, with gradients for x (..., i) and for the terms' A (r, i) and B (o, r).

    W (o, i) and the bias (o,) are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        terms: Sequence[LowRankTerm],
        compute: torch.dtype,
        autocast: bool,
        noted: tuple[SharedInput, Recompute | None],
        *factors: Tensor,
    ) -> Tensor:
        """Compute y (..., o) from x (..., i).

        Args:
            ctx: Holds what backward needs.
            x: (..., i).
            layer: The adapted layer.
            weight: Its weight, as it stores it.
            bias: (o,), or None.
            terms: The low-rank terms.
            compute: dtype of the thin products.
            autocast: True if autocast is on.
            noted: What is known of x in the table of activations.
            *factors: A and B of each term, as inputs of the node.
        """
        shared, recipe = noted
        with _types_as_given(x.device.type):  # chosen here, as autocast would choose them
            out_features = factors[1].shape[0]
            y = _base_forward(layer, x, weight, bias, out_features, compute if autocast else None)
            rows = y.view(-1, out_features)  # (N, o)
            flat = x.reshape(-1, x.shape[-1]).to(compute)  # (N, i)
            lows = []
            for term in terms:
                read = apply_mask(flat, _bits(term, flat)) if term.p else flat
                low = (read @ term.a.to(compute).T).mul_(term.factor)  # (N, i) -> (N, r)
                _add_product(rows, low, term.b.to(compute).T)
                lows.append(low)
        source = (x,) if recipe is None else recipe.inputs
        ctx.recompute = None if recipe is None else recipe.compute
        ctx.save_for_backward(weight, *factors, *lows, *source)
        ctx.layer, ctx.shared, ctx.terms = layer, shared, [(term.factor, term.p, term.seed) for term in terms]
        ctx.compute, ctx.x_dtype, ctx.x_shape, ctx.base_dtype = compute, x.dtype, x.shape, y.dtype
        if any(ctx.needs_input_grad):
            shared.register()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for x (..., i) and the factors from that for y (..., o)."""
        count = len(ctx.terms)
        weight, *saved = ctx.saved_tensors
        factors, lows, source = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        compute, shared = ctx.compute, ctx.shared
        wanted = ctx.needs_input_grad[8:]
        with _types_as_given(grad.device.type):
            g = grad.reshape(-1, grad.shape[-1])  # (N, o)
            thin_g = g.to(compute)
            grad_x = _base_backward(ctx.layer, weight, g, ctx.base_dtype) if ctx.needs_input_grad[0] else None
            grads: list[Tensor | None] = []
            for index, (factor, p, seed) in enumerate(ctx.terms):
                a, b = factors[2 * index], factors[2 * index + 1]
                want_a, want_b = wanted[2 * index], wanted[2 * index + 1]
                grads.extend((None, (lows[index].T @ thin_g).T.to(b.dtype) if want_b else None))
                if not want_a and grad_x is None:
                    continue
                thin = (b.to(compute).T @ thin_g.T).mul_(factor)  # (r, N)
                bits = None
                if p:
                    bits = shared.made(seed, lambda seed=seed, p=p: _drawn(seed, p, ctx.x_shape, grad.device))
                if want_a:
                    grads[-2] = (thin @ _read(ctx, source, bits, seed)).to(a.dtype)
                if grad_x is not None:
                    if bits is None:
                        _add_product(grad_x, thin.T, a.to(compute))
                    else:
                        grad_x.add_(apply_mask_(thin.T @ a.to(compute), bits))
            shared.leave()
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return (grad_x, None, None, None, None, None, None, None, *grads)


def _types_as_given(device: str) -> AbstractContextManager[Any]:
    """Turn autocast off if it is on; entering the context costs 20 µs."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    if y.dtype == left.dtype:
        y.addmm_(left, right)
    else:
        y.add_(left @ right)


def _bits(term: LowRankTerm, flat: Tensor) -> Tensor:
    return mask_bits(term.seed, term.p, flat.shape[0], flat.shape[1], flat.device)


def _drawn(seed: int, p: float, shape: torch.Size, device: torch.device) -> Tensor:
    width = shape[-1]
    return mask_bits(seed, p, shape[:-1].numel(), width, device)


def _read(ctx: Any, source: Sequence[Tensor], bits: Tensor | None, seed: int) -> Tensor:
    """Return the layer's input (N, i) as the low-rank path read it."""
    shared: SharedInput = ctx.shared

    def whole() -> Tensor:
        x = source[0] if ctx.recompute is None else shared.made("x", lambda: ctx.recompute(*source))
        return x.reshape(-1, x.shape[-1]).to(ctx.compute)

    if bits is None:
        return whole()
    return shared.made((seed, "read"), lambda: apply_mask(whole(), bits))


def _base_backward(layer: nn.Module, weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g W, (N, i)."""
    if is_quantized(weight):
        weight = base_weight(layer)
    elif is_transposed(layer):
        weight = weight.T
    return g.to(dtype) @ weight.to(dtype)


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of the same size as a floating type, by bytes."""


def apply_mask(x: Tensor, bits: Tensor) -> Tensor:
    """Return ``x`` with zeros where `mask_bits` has no bits set; without gradients, not scaled.

    Args:
        x: (N, i), of any floating type.
        bits: (N, i), int32 or bool.
    """
    if bits.dtype == torch.bool:
        return x * bits
    word = _WORDS[x.element_size()]
    return (x.view(word) & bits.to(word)).view(x.dtype)


def apply_mask_(x: Tensor, bits: Tensor) -> Tensor:
    """Mask as `apply_mask` does, in place: x (N, i), bits (N, i)."""
    if bits.dtype == torch.bool:
        return x.mul_(bits)
    word = _WORDS[x.element_size()]
    x.view(word).bitwise_and_(bits.to(word))
    return x
