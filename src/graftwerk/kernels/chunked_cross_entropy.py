"""Cross-entropy of a vocabulary head without its logits, in tiles of the vocabulary.

The logits of N tokens over V words, their softmax and its gradient are by far the largest tensors of a language model
in training. None of them is needed as a whole. With a frozen head one pass over the vocabulary is enough, as in
FlashAttention (Dao et al. 2022, arXiv:2205.14135, section 3.1; softmax there over keys, here over words):

    m_t = max(m, max z_t)      s_t = s e^(m - m_t) + sum e^(z_t - m_t)      a_t = a e^(m - m_t) + e^(z_t - m_t) W_t

where z_t are the logits of tile t. At the end log s + m is the log-partition and a / s = softmax(z) W, so the gradient
for the hidden states is a / s - W[label], exactly, in 4 d V operations a token and nothing computed twice. A head that
is trained needs the normalised softmax for its own gradient: its tiles are computed once more (8 d V instead of 6).

Sums over tiles are in float32 whatever the dtype of the products (float64 if the hidden states are).

Legend: N labelled tokens, d width of the hidden states, V words, v words of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftwerk.errors import ModelError

TILES = 32
"""Number of tiles of the vocabulary: memory is that of the logits divided by it. Fewer tiles are no faster."""
LEAST_WORDS = 256
"""Smallest number of words in a tile; with fewer the products are too thin."""
DEVICE_ELEMENTS = 2**23
"""Smallest number of logits in a tile off the CPU, where launching a kernel takes as long as computing so many."""
MOST_ELEMENTS = 2**26
"""Largest number of logits in a tile, over all tokens: more tokens are processed in parts."""
ROOM = 2.0**14
"""Bound of a product in float16, whose largest number is 65,504."""


@dataclass(frozen=True)
class Head:
    """A vocabulary head: logits are ``cap * tanh(z / cap)`` of ``z = scale * (hidden W^T + bias)``.

    Attributes:
        weight: (V, d).
        bias: (V,) or None.
        added: (V,) or None: a second bias that is never trained (`final_logits_bias` of BART's family).
        scale: Factor of all logits (Cohere, Granite).
        cap: Bound of the logits (Gemma 2), or None if there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    added: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def tile(self, hidden: Tensor, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
        """Return the logits of some words.

        Args:
            hidden: (N, d); products are in its dtype.
            lo: First word.
            hi: The word after the last.
            dtype: dtype of the result.

        Returns:
            (N, v).
        """
        z = torch.mm(hidden, self.weight[lo:hi].to(hidden.dtype).T).to(dtype)
        for bias in (self.bias, self.added):
            if bias is not None:
                z += bias.reshape(-1)[lo:hi]
        if self.scale != 1.0:
            z *= self.scale
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """Return the derivative of the logits with respect to ``hidden W^T + bias``.

        Args:
            z: Logits, (N, v) or (N,).

        Returns:
            A tensor of the same shape, or a number if the derivative is constant.
        """
        if self.cap is None:
            return self.scale
        return (z / self.cap).square_().neg_().add_(1.0).mul_(self.scale)

    @property
    def trained(self) -> bool:
        """True if the weight or the bias is trained."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def chunked_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    tile: int | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of ``hidden`` against ``labels``, as `F.cross_entropy` of the logits does.

    Under autocast the products are in its dtype, as those of a linear layer are.

    Args:
        hidden: (N, d), the head's input at each labelled token.
        head: The vocabulary head.
        labels: (N,) int64, each of the V words.
        label_smoothing: Share of each target that is spread evenly over all words.
        weights: (N,), the weight of each token, or None for 1 / N, which makes the sum a mean.
        tile: Words of a tile, or None for `tile_words`.
        checked: True if `check_labels` has passed the labels already, on the host and without a wait for the device.

    Returns:
        The weighted sum, a scalar with gradients for hidden states, weight and bias (0 if no token is labelled);
        and the negative log-likelihood of each label in nats, (N,), without smoothing, weights or gradient.

    Raises:
        ModelError: a label is none of the V words; -100 is not one either, callers leave such tokens out.
    """
    words = head.weight.shape[0]
    if not checked:
        check_labels(labels, words)
    tile = tile or tile_words(words, len(labels), hidden.device)
    if weights is None:
        weights = hidden.new_full((len(labels),), 1.0 / max(len(labels), 1), dtype=_sums_in(hidden))
    kind = hidden.device.type
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or head.trained)
    loss, nll = _BlockLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, weights, label_smoothing, tile, product, wanted
    )
    return loss, nll


def tile_words(words: int, tokens: int, device: torch.device) -> int:
    """Return the words of a tile: V / `TILES`, or off the CPU as many as are worth the launch of a kernel.

    Args:
        words: V.
        tokens: N.
        device: Where the logits are computed.
    """
    tile = max(LEAST_WORDS, -(-words // TILES))
    return tile if device.type == "cpu" else min(words, max(tile, DEVICE_ELEMENTS // max(tokens, 1)))


def check_labels(labels: Tensor, words: int) -> None:
    """Raise ModelError for a label outside the vocabulary.

    No tile would contain it, and its logit would silently count as 0. The device is synchronised once for all labels.

    Args:
        labels: (N,) int64.
        words: V.

    Raises:
        ModelError: a label is none of the V words.
    """
    if not len(labels):
        return
    least, most = torch.stack(labels.aminmax()).tolist()
    if least < 0 or most >= words:
        raise ModelError(
            f"a label is the word {least if least < 0 else most}, and the model's words are 0 to {words - 1}",
            where="labels",
            hint="use the tokenizer that belongs to the model",
        )


def _sums_in(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _BlockLoss(torch.autograd.Function):
    """The loss as an autograd node: forward computes the gradients, tile by tile; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        weights: Tensor,
        smoothing: float,
        tile: int,
        product: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        sums = _sums_in(hidden)
        nll = torch.empty(len(labels), dtype=sums, device=hidden.device)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        trained = wanted and head.trained
        grads = _Gradients(
            torch.zeros(hidden.shape, dtype=sums, device=hidden.device) if wanted and hidden.requires_grad else None,
            torch.zeros(weight.shape, dtype=sums, device=hidden.device) if trained and weight.requires_grad else None,
            torch.zeros(bias.shape, dtype=sums, device=hidden.device)
            if trained and bias is not None and bias.requires_grad
            else None,
        )
        # the gradient of a softmax with both label smoothing and a cap has no one-pass form
        once = grads.hidden is not None and not trained and not (smoothing and head.cap is not None)
        most = max(1, MOST_ELEMENTS // tile)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(labels), most):
                part = slice(first, first + most)
                tokens = _Tokens(hidden[part].to(product), labels[part], weights[part].to(sums), smoothing, tile, sums)
                lse, picked, mean = tokens.sums_over(
                    head, grads.hidden[part] if once and grads.hidden is not None else None
                )
                nll[part] = lse - picked
                each = nll[part]
                if smoothing:
                    each = (1 - smoothing) * each + smoothing * (lse - mean)
                loss += (each * tokens.weights).sum()
                if not once and not grads.empty:
                    tokens.gradients(head, lse, grads, part)
        ctx.save_for_backward(*grads.tensors())
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * outer[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None, None


@dataclass
class _Gradients:
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias

    @property
    def empty(self) -> bool:
        return all(tensor is None for tensor in self.tensors())


@dataclass
class _Tokens:
    """Tokens processed together. ``hidden`` is in the dtype of the products, ``weights`` in that of the sums."""

    hidden: Tensor
    labels: Tensor
    weights: Tensor
    smoothing: float
    tile: int
    sums: torch.dtype

    def tiles(self, head: Head) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first word, the word after the last, and logits (N, v) of each tile."""
        words = head.weight.shape[0]
        for lo in range(0, words, self.tile):
            hi = min(lo + self.tile, words)
            yield lo, hi, head.tile(self.hidden, lo, hi, self.sums)

    def sums_over(self, head: Head, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run one pass over the vocabulary.

        Args:
            head: The LM head.
            grad: (N, d) zeros that become the gradient for the hidden states, or None if it is not wanted.

        Returns:
            Log-partition, logit of the label and mean logit (0 without smoothing) of each token, (N,) each.
        """
        n, words = len(self.labels), head.weight.shape[0]
        most = torch.full((n,), torch.finfo(self.sums).min, dtype=self.sums, device=self.hidden.device)
        total, picked, summed = torch.zeros_like(most), torch.zeros_like(most), torch.zeros_like(most)
        every = torch.zeros(self.hidden.shape[1], dtype=self.sums, device=self.hidden.device)
        for lo, hi, z in self.tiles(head):
            word = self.labels - lo  # (N,), index within the tile
            here = z.gather(1, word.clamp(0, hi - lo - 1)[:, None])[:, 0]
            picked = torch.where((word >= 0) & (word < hi - lo), here, picked)
            if self.smoothing:
                summed += z.sum(1)
            slope = head.slope(z) if grad is not None and head.cap is not None else None
            before, most = most, torch.maximum(most, z.amax(1))
            shrink = (before - most).exp_()
            z.sub_(most[:, None]).exp_()  # (N, v)
            total.mul_(shrink).add_(z.sum(1))
            if grad is None:
                continue
            if slope is not None:
                z.mul_(slope)
            part = head.weight[lo:hi].to(self.hidden.dtype)
            if self.hidden.dtype == self.sums:
                grad.mul_(shrink[:, None]).addmm_(z, part)
            else:
                grad.mul_(shrink[:, None]).add_(torch.mm(z.to(part.dtype), part))
            if self.smoothing:
                every += part.sum(0, dtype=self.sums)
        if grad is not None:
            grad.div_(total[:, None])
            if head.cap is None:
                grad.mul_(head.scale)
            slope = head.slope(picked)
            target = (self.weights.new_ones(n) if isinstance(slope, Tensor) else 1.0) * slope * (1 - self.smoothing)
            target = target[:, None] if isinstance(target, Tensor) else target
            grad.sub_(head.weight[self.labels].to(self.sums) * target)
            if self.smoothing:
                grad.sub_(every * (self.smoothing * head.scale / words))
            grad.mul_(self.weights[:, None])
        return total.log() + most, picked, summed / words

    def gradients(self, head: Head, lse: Tensor, grads: _Gradients, part: slice) -> None:
        """Run a second pass, with the normalised softmax, and add to all gradients that are wanted."""
        words = head.weight.shape[0]
        for lo, hi, z in self.tiles(head):
            slope = head.slope(z) if head.cap is not None else head.scale
            z.sub_(lse[:, None]).exp_()
            if self.smoothing:
                z.sub_(self.smoothing / words)
            word = self.labels - lo  # (N,), index within the tile
            inside = (word >= 0) & (word < hi - lo)
            off = inside.to(z.dtype) * (self.smoothing - 1.0)
            z.scatter_add_(1, word.clamp(0, hi - lo - 1)[:, None], off[:, None])
            z.mul_(self.weights[:, None]).mul_(slope)
            if grads.bias is not None:
                grads.bias[lo:hi] += z.sum(0)
            if self.hidden.dtype != torch.float16:
                z = z.to(self.hidden.dtype)
            if grads.weight is not None:
                _add_product(grads.weight[lo:hi], z.T, self.hidden)
            if grads.hidden is not None:
                _add_product(grads.hidden[part], z, head.weight[lo:hi].to(self.hidden.dtype))


def _add_product(to: Tensor, one: Tensor, other: Tensor) -> None:
    """Add ``one other`` to ``to``; the product is in the dtype of ``other``, for float16 scaled."""
    if one.dtype != other.dtype:
        to.add_(_scaled_product(one, other))
    elif to.dtype == one.dtype:
        to.addmm_(one, other)
    else:
        to.add_(torch.mm(one, other))


def _scaled_product(one: Tensor, other: Tensor) -> Tensor:
    """Return ``one other``, computed in float16, in the dtype of ``one``.

    The softmax of a rare word, shared out over all tokens, is below the smallest number of float16. A factor for each
    row of ``one`` lifts it, and is divided out of the product again. It is as large as possible without overflow in the
    product; scaling the loss would not help, since the loss scale is applied after this product.
    """
    bound: Tensor = torch.linalg.vector_norm(one, 1, dim=1, keepdim=True)
    bound *= torch.linalg.vector_norm(other, torch.inf).to(bound.dtype).clamp_min(1.0)
    factor = ROOM / bound.clamp_min(1e-30)  # a row of zeros stays one
    lifted = torch.mul(one, factor, out=torch.empty_like(one, dtype=other.dtype))
    return torch.mm(lifted, other).to(one.dtype) / factor
