"""The loss in tiles of the vocabulary is torch's cross-entropy, gradients and all, and never makes the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from graftwerk.errors import ModelError
from graftwerk.kernels import chunked_cross_entropy as module
from graftwerk.kernels.chunked_cross_entropy import Head, chunked_cross_entropy

WORDS, WIDTH = 501, 16


def made(tokens: int = 37, *, dtype: torch.dtype = torch.float64, trained: bool = False, **shape: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    hidden = draw(tokens, WIDTH).requires_grad_()
    weight, bias = (draw(WORDS, WIDTH) * 0.5).requires_grad_(trained), draw(WORDS).requires_grad_(trained)
    labels = torch.randint(WORDS, (tokens,), generator=generator)
    return hidden, Head(weight, bias, draw(1, WORDS), **shape), labels


def logits(hidden: Tensor, head: Head) -> Tensor:
    assert head.bias is not None
    assert head.added is not None
    z = (hidden @ head.weight.T + head.bias + head.added) * head.scale
    return z if head.cap is None else head.cap * torch.tanh(z / head.cap)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [{}, {"scale": 0.5}, {"cap": 3.0}, {"scale": 2.0, "cap": 3.0}])
def test_loss_and_gradients_equal_full_logits(
    shape: dict[str, float], smoothing: float, trained: bool, weighted: bool
) -> None:
    hidden, head, labels = made(trained=trained, **shape)
    weights = torch.rand(len(labels), dtype=torch.float64) if weighted else None
    each = F.cross_entropy(logits(hidden, head), labels, reduction="none", label_smoothing=smoothing)
    expected = each.mean() if weights is None else (each * weights).sum()
    wanted = [hidden, head.weight, head.bias] if trained else [hidden]
    gradients = torch.autograd.grad(expected * 3, wanted)
    loss, nll = chunked_cross_entropy(hidden, head, labels, label_smoothing=smoothing, weights=weights, tile=64)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(nll, F.cross_entropy(logits(hidden, head), labels, reduction="none"), atol=1e-12)
    for found, right in zip(torch.autograd.grad(loss * 3, wanted), gradients, strict=True):
        assert torch.allclose(found, right, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 2, 250, 500, 501, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_at_tile_and_part_boundaries_equals_full_logits(
    tile: int, tokens: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ELEMENTS", 2 * tile)  # two tokens at a time
    hidden, head, _ = made(tokens, trained=trained)
    for label in (0, tile - 1, tile, WORDS - 1):
        labels = torch.full((tokens,), min(label, WORDS - 1))
        wanted = [hidden, head.weight, head.bias] if trained else [hidden]
        expected = F.cross_entropy(logits(hidden, head), labels)
        loss, _ = chunked_cross_entropy(hidden, head, labels, tile=tile)
        assert torch.allclose(loss, expected, atol=1e-12)
        for found, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
            assert torch.allclose(found, right, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_loss_without_labels_is_zero_with_zero_gradients(trained: bool) -> None:
    hidden, head, labels = made(0, trained=trained)
    loss, nll = chunked_cross_entropy(hidden, head, labels)
    loss.backward()
    assert float(loss.detach()) == 0
    assert nll.shape == (0,)
    assert hidden.grad is not None
    if trained:
        assert float(head.weight.grad.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_large_logits_is_finite(dtype: torch.dtype) -> None:
    hidden, head, labels = made(dtype=dtype)
    hidden = (hidden.detach() * 100).requires_grad_()
    each = F.cross_entropy(
        (hidden.float() @ head.weight.float().T + head.bias.float() + head.added.float()), labels, reduction="none"
    )
    loss, nll = chunked_cross_entropy(hidden, head, labels, tile=64)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(nll, each, rtol=1e-5 if dtype == torch.float32 else 3e-2, atol=1e-3)
    assert bool(torch.isfinite(hidden.grad).all())


def test_loss_with_excluded_words_equals_full_logits() -> None:
    hidden, head, _ = made(3)
    added = torch.zeros(WORDS, dtype=torch.float64)
    added[:70] = -torch.inf  # a whole tile
    head = Head(head.weight, None, added)
    labels = torch.tensor([80, 90, 500])
    loss, _ = chunked_cross_entropy(hidden, head, labels, tile=64)
    expected = F.cross_entropy(hidden @ head.weight.T + added, labels)
    assert torch.allclose(loss, expected)
    (found,), (right,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    assert torch.allclose(found, right)


def test_loss_under_autocast_uses_autocast_dtype() -> None:
    hidden, head, labels = made(dtype=torch.float32)
    head = Head(head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(F.linear(hidden, head.weight).float(), labels)
        loss, _ = chunked_cross_entropy(hidden, head, labels, tile=64)
    assert torch.allclose(loss, expected, atol=1e-6)
    (found,), (right,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    assert found.dtype == torch.float32
    assert torch.allclose(found, right, atol=0.02 * float(right.abs().max()))


@pytest.mark.parametrize(
    ("trained", "smoothing", "cap"), [(True, 0.0, None), (True, 0.1, None), (True, 0.0, 3.0), (False, 0.1, 3.0)]
)
def test_gradients_of_rare_words_in_float16_are_nonzero(trained: bool, smoothing: float, cap: float | None) -> None:
    tokens, words = 512, 32000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=generator).requires_grad_()
    weight = (torch.randn(words, 8, generator=generator) * 0.1).requires_grad_(trained)
    labels = torch.randint(words, (tokens,), generator=generator)
    z = hidden @ weight.T
    z = z if cap is None else cap * torch.tanh(z / cap)
    wanted = [hidden, weight] if trained else [hidden]
    expected = torch.autograd.grad(F.cross_entropy(z, labels, label_smoothing=smoothing), wanted)
    with torch.autocast("cpu", torch.float16):
        loss, _ = chunked_cross_entropy(hidden, Head(weight, cap=cap), labels, label_smoothing=smoothing)
    found = torch.autograd.grad(loss * 65536, wanted)
    unsaid = torch.ones(words, dtype=torch.bool)
    unsaid[labels] = False
    for got, right, rows in zip(found, expected, (slice(None), unsaid), strict=False):
        # that the logits themselves are in float16 makes .0004
        assert float((got[rows] / 65536 - right[rows]).norm()) <= 0.001 * float(right[rows].norm())


def test_products_in_float16_do_not_overflow() -> None:
    tokens, size = 4000, 300.0
    hidden = torch.full((tokens, WIDTH), size).requires_grad_()
    weight = (torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)) * 1e-4).requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long)  # all of them pull at one row
    weights = torch.ones(tokens)
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), [hidden, weight])
    with torch.autocast("cpu", torch.float16):
        loss, _ = chunked_cross_entropy(hidden, Head(weight), labels, weights=weights)
    assert float(expected[1].abs().max()) > torch.finfo(torch.float16).max
    for got, right in zip(torch.autograd.grad(loss, [hidden, weight]), expected, strict=True):
        assert torch.allclose(got, right, atol=0.002 * float(right.abs().max()))


def test_gradients_of_zero_in_float16_stay_zero() -> None:
    hidden, head, labels = made(3, dtype=torch.float16, trained=True)
    loss, _ = chunked_cross_entropy(hidden, head, labels, weights=torch.zeros(3))
    for got in torch.autograd.grad(loss, [hidden, head.weight, head.bias]):
        assert not bool(got.any())


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("label", [WORDS, 10 * WORDS, -1, -100])
def test_loss_label_outside_vocabulary_raises(label: int, wanted: bool) -> None:
    hidden, head, labels = made(3)
    labels[1] = label
    with torch.set_grad_enabled(wanted), pytest.raises(ModelError, match=rf"{label}, and the model's words are 0 to 5"):
        chunked_cross_entropy(hidden, head, labels)


class Asked(TorchDispatchMode):
    """How often a value is read out of a tensor, for which a GPU has to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func in (torch.ops.aten.aminmax.default, torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [False, True])
def test_labels_are_checked_once_for_all_tiles(trained: bool) -> None:
    hidden, head, labels = made(trained=trained)
    with Asked() as seen:
        chunked_cross_entropy(hidden, head, labels, tile=16)
    assert seen.times == 1


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_never_allocates_logits(smoothing: float) -> None:
    tokens, words = 400, 16000
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head, labels = Head(torch.randn(words, 8)), torch.randint(words, (tokens,))
    kept: list[int] = []
    with (
        Largest() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t),
    ):
        chunked_cross_entropy(hidden, head, labels, label_smoothing=smoothing)[0].backward()
    assert 0 < seen.elements <= 0.05 * tokens * words
    assert sum(kept) <= 2 * hidden.numel()
    with Largest() as whole:
        F.cross_entropy(hidden @ head.weight.T, labels)
    assert whole.elements == tokens * words


@pytest.mark.parametrize(
    ("words", "tokens", "kind", "tile"),
    [
        (128_000, 4096, "cpu", 4000),  # V / 32
        (128_000, 16, "cpu", 4000),
        (500, 16, "cpu", module.LEAST_WORDS),
        (128_000, 4096, "cuda", 4000),  # 16 million logits are worth a kernel
        (128_000, 512, "cuda", 16_384),
        (128_000, 16, "cuda", 128_000),  # few tokens: all words at once
        (128_000, 0, "xpu", 128_000),
    ],
)
def test_tiles_off_the_cpu_are_worth_a_launch(words: int, tokens: int, kind: str, tile: int) -> None:
    assert module.tile_words(words, tokens, torch.device(kind)) == tile
