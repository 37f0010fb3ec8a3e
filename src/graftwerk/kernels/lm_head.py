"""The input of a language model's vocabulary head at labelled tokens, in place of logits.

The model's own forward runs, wrapped as it may be; a hook on the head takes its input and passes on two tokens, or one.
The steps from head to logits (a second bias, a factor, a cap) are not read from the model's code: the first pass
compares its logits for two tokens, one of them so large that a cap shows, with those of a `Head`.
A model that no `Head` describes, or whose head is no plain linear layer, computes its logits as ever.

Legend: B rows, T tokens, N labelled tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from graftwerk.devices import backend, is_out_of_memory
from graftwerk.kernels.chunked_cross_entropy import Head, chunked_cross_entropy
from graftwerk.methods.base_weights import is_plain

LARGE = 100.0
"""Largest logit of the probe after scaling: beyond every cap in use (Gemma 2: 30)."""
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Largest difference of two logits that are the same, against the largest logit; for other types `CLOSE_HALF`."""
CLOSE_HALF = 2e-2

Shape = tuple[float, float | None, bool]
"""Scale, cap, and whether `final_logits_bias` is added."""

_FOUND = "_graftwerk_logits"
"""Attribute of a head module: the shape found, or None if no `Head` describes its model."""


class LabelledLogits:
    """The outputs of a pass whose logits are not made.

    Args:
        hidden: (N, d), the head's input where a label is, row by row.
        head: The vocabulary head.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        self._nll: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(N, V), computed on demand as the model computes them, in the dtype of its products."""
        weight = self.head.weight
        made = F.linear(self.hidden.to(weight.dtype), weight)
        return _finished(made, self.head)

    def loss(self, labels: Tensor, label_smoothing: float = 0.0, *, checked: bool = False) -> Tensor:
        """Return the mean cross-entropy over the N tokens, a scalar in float32; labels (N,), perhaps checked before."""
        loss, nll = chunked_cross_entropy(
            self.hidden, self.head, labels, label_smoothing=label_smoothing, checked=checked
        )
        self._nll = nll
        return loss

    def nll(self, labels: Tensor, *, checked: bool = False) -> Tensor:
        """Return the negative log-likelihood of each label in nats, (N,), without gradient; labels as in `loss`."""
        if self._nll is None:
            with torch.no_grad():
                self._nll = chunked_cross_entropy(self.hidden.detach(), self.head, labels, checked=checked)[1]
        return self._nll


def comparable(outputs: Any) -> Tensor:
    """Return what passes over the same rows are compared by: logits (N, V), or in their place the head's inputs (N, d).

    Those take a hundredth of the memory, and differ where the logits do.
    """
    found: Tensor = outputs.hidden if isinstance(outputs, LabelledLogits) else outputs.logits
    return found.float()


def labelled_tokens(
    model: Any, inputs: Mapping[str, Any], shape: Sequence[int], positions: Tensor
) -> LabelledLogits | None:
    """Run ``model`` up to its head.

    Args:
        model: A language model, or its wrapper for several processes.
        inputs: Its keyword arguments.
        shape: (B, T) of the labels.
        positions: (N,), the places among B T whose logits would be compared with a label.

    Returns:
        The head's inputs, or None if the model's logits cannot be had that way; the caller then runs the plain path,
        which draws the same random numbers as if this pass had not been.
    """
    if hasattr(model, "_orig_mod"):  # compiled: its head is called inside
        return None
    plain = getattr(model, "module", model)
    module: nn.Module | None = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    if module is None or not _is_plain(module):
        return None
    if isinstance(module.weight, FakeTensor):  # nothing to compare: what the configuration names takes the most memory
        vars(module)[_FOUND] = _possible(plain)[-1]
    known: Shape | None = vars(module).get(_FOUND)
    if known is None and _FOUND in vars(module):
        return None
    drawn = None if known is not None else _RandomState(positions.device)
    tap = _Tap(probing=known is None)
    try:
        with tap.on(module):
            outputs = model(**inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        if known is not None or is_out_of_memory(error):  # says nothing of the head
            raise
        outputs = None
    hidden = tap.hidden
    if outputs is None or hidden is None or tap.calls != 1 or hidden.shape[:-1] != shape:
        if known is None:
            vars(module)[_FOUND] = None
        found = None
    else:
        found = known if known is not None else _recognised(plain, module, tap, outputs.logits)
    if found is None or hidden is None:
        if drawn is not None:
            drawn.put_back()
        return None
    return LabelledLogits(hidden.flatten(0, 1)[positions], _head(plain, module, found))


class _Tap:
    """Forward pre-hook of a head: stores its input and passes on a token or two of it."""

    def __init__(self, *, probing: bool) -> None:
        self.probing = probing
        self.hidden: Tensor | None = None
        self.probe: Tensor | None = None
        self.calls = 0

    @contextmanager
    def on(self, head: nn.Module) -> Iterator[None]:
        handle = head.register_forward_pre_hook(self)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        self.hidden = args[0]
        self.calls += 1
        first = args[0].detach()[(slice(0, 1),) * (args[0].dim() - 1)]
        if self.probing:
            assert isinstance(head.weight, Tensor)
            logits = F.linear(first, head.weight.detach())
            factor = LARGE / logits.float().abs().amax().clamp_min(1e-6)
            self.probe = torch.cat([first, first * factor.to(first.dtype)], dim=-2)
            return (self.probe,)
        return (first,)


def _is_plain(head: nn.Module) -> bool:
    """Return True for a linear layer that nothing is attached to: no adapter, no hook, no other forward."""
    return (
        type(head) is nn.Linear
        and is_plain(head.weight)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and not head._backward_hooks
        and "forward" not in vars(head)
    )


@torch.no_grad()
def _recognised(model: Any, module: nn.Module, tap: _Tap, logits: Any) -> Shape | None:
    """Return how the model makes logits, or None if in no known way; remembered unless the probe was inconclusive."""
    assert tap.probe is not None
    wanted = tap.probe.shape[:-1]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != wanted:
        vars(module)[_FOUND] = None
        return None
    plain = F.linear(tap.probe, module.weight, module.bias)  # type: ignore[arg-type]
    if not float(plain.float().abs().amax()) > 1.0:
        return None  # a head of zeros says nothing: asked again next time
    for shape in _possible(model):
        made = _finished(plain, _head(model, module, shape), biased=True)
        close = CLOSE.get(logits.dtype, CLOSE_HALF)
        # each of the two tokens against its own largest logit
        bound = close * logits.float().abs().amax(-1)
        if bool(((made.float() - logits.float()).abs().amax(-1) <= bound).all()):
            vars(module)[_FOUND] = shape
            return shape
    vars(module)[_FOUND] = None
    return None


def _possible(model: Any) -> list[Shape]:
    """Return the ways in which a model may make logits, by its configuration; the last uses all that it names."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    scales = [1.0]
    for name, factor in (("logit_scale", float), ("logits_scaling", lambda value: 1.0 / value)):
        value = getattr(model, name, None) or getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales.append(factor(value))
    cap = getattr(config, "final_logit_softcapping", None)
    caps = [None, cap] if cap is not None else [None]
    added = [False, True] if isinstance(getattr(model, "final_logits_bias", None), Tensor) else [False]
    return [(scale, cap, second) for second in added for scale in scales for cap in caps]


def _finished(made: Tensor, head: Head, *, biased: bool = False) -> Tensor:
    """Return the logits from ``made = hidden W^T``; ``biased``: the head's own bias is in it already."""
    if head.bias is not None and not biased:
        made = made + head.bias
    if head.added is not None:
        made = made + head.added.reshape(-1)
    made = made * head.scale
    return made if head.cap is None else head.cap * torch.tanh(made / head.cap)


def _head(model: Any, module: nn.Module, shape: Shape) -> Head:
    scale, cap, second = shape
    added = model.final_logits_bias if second else None
    return Head(module.weight, module.bias, added, scale, cap)  # type: ignore[arg-type]


class _RandomState:
    """The state of the random generators that a pass may draw from."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.module = backend(device)
        self.own = None if self.module is None else self.module.get_rng_state()

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.module is not None:
            self.module.set_rng_state(self.own)
