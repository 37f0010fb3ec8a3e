"""QERA initialization: LoRA on a quantized layer starts as the low-rank matrix that best corrects the layer's outputs.

Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error Reconstruction", arXiv:2410.06040, the
approximate solution, which takes the entries of the input as uncorrelated:

    h = Q x + s B A x        s B A = U_r S_r V_r^T D^-1,  U S V^T = (W - Q) D,  D = diag(sqrt(mean x_i^2))

This minimises the mean of ||(W - Q - s B A) x||^2 for such inputs. LoftQ (Li et al. 2023, arXiv:2310.08659) is the case
D = 1, without data. Parameters: r (in + out), as LoRA; after the start it is LoRA.
Trade-off: it starts nearer to the full model, for a pass over some rows and a singular value decomposition per layer;
the adapter then corrects the error of these codes, and adds one to a base in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER_ITERATIONS = 8
"""Rounds of the randomised decomposition. On Gaussian matrices up to 2,048 wide, whose singular values decay slowly, it
captures at least 98 % of the optimal energy, and nearly all of it if some inputs are larger than others."""


def qera_init(error: Tensor, mean_square: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return QERA's A (r, in) and B (out, r), with scale B A nearest to the error for inputs with these mean squares.

    Each singular value is split evenly between A and B: a row of A and its column of B have the same norm. Directions
    without error keep the rows of A and columns of B that were drawn. The decomposition is randomised and draws from
    torch's global generator.

    Args:
        error: W - Q, (out, in).
        mean_square: Mean of the squared entries of the layer's input, (in,).
        a: A as drawn, (r, in).
        b: B as drawn, (out, r).
        scale: s.

    Example:
        >>> error = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
        >>> a, b = qera_init(error, torch.ones(3), torch.ones(1, 3), torch.zeros(2, 1), scale=2.0)
        >>> bool((2 * b @ a - error).abs().max() < 1e-5)
        True
    """
    rms = mean_square.float().sqrt()  # D, (in,)
    rms = rms.clamp_min(1e-6 * float(rms.max()))  # inputs that are always 0 weigh nothing
    rank = min(len(a), *error.shape)
    u, s, v = torch.svd_lowrank(error.float() * rms, min(4 * rank + 16, *error.shape), niter=POWER_ITERATIONS)
    found = int((s[:rank] > 1e-6 * s[0]).sum()) if s[0] > 0 else 0
    u, s, directions = u[:, :found], s[:found], v[:, :found].T / rms  # (out, k), (k,), (k, in)
    lengths = directions.norm(dim=1)  # (k,)
    started_a, started_b = a.detach().clone(), b.detach().clone()
    started_a[:found] = torch.sqrt(s / (scale * lengths))[:, None] * directions
    started_b[:, :found] = u * torch.sqrt(s * lengths / scale)
    return started_a, started_b
