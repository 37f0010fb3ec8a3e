"""A linear layer and its LoRA in one autograd node.

The plain path costs little arithmetic and much traffic: each adapted layer keeps several thin intermediates, adds
whole outputs and gradients out of place, and multiplies in orders that suit no GEMM kernel. Here the input is kept
once, sums happen in place, and thin products are taken with the thin side first. Same sums as `LoRADelta.leave`, up
to rounding.

Legend: N rows times tokens, i inputs, o outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LoRALinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, with gradients for x, A and B (W and bias are frozen)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x (..., i), weight (o, i), bias (o,) or None, a (r, i), b (o, r) -> (..., o)."""
        flat = x.reshape(-1, x.shape[-1])
        low = (flat @ a.T).mul_(scale)
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        y.addmm_(low, b.T)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        flat, weight, a, b, low = ctx.saved_tensors
        (grad,) = grads
        g = grad.reshape(-1, grad.shape[-1])
        grad_b = (low.T @ g).T  # (r, N) first: the other order runs at a third of the speed
        thin = (g @ b).mul_(ctx.scale)
        grad_a = thin.T @ flat
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(thin, a).view(*grad.shape[:-1], flat.shape[-1])
        return grad_x, None, None, grad_a, grad_b, None
