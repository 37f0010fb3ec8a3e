"""The parts of a training that need values of tensors, for one whose tensors are fake: shapes without values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import AttentionMaskInterface

from graftwerk.evaluation.inference import without_cache, without_gradients
from graftwerk.modeling.frozen_layers import reach
from graftwerk.modeling.module_index import modes_restored
from graftwerk.models.quantization import Quantization, import_bitsandbytes
from graftwerk.tasks.base import Example, Task
from graftwerk.training.activation_cache.cache import ROWS, ActivationCache
from graftwerk.training.activation_cache.plan import cache_dtype
from graftwerk.training.activation_cache.rows import Slots
from graftwerk.training.activation_cache.store import chunks
from graftwerk.training.distributed.single import SingleProcess
from graftwerk.training.retention.base import Setting


def without_values(fake: FakeTensorMode, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shapes of a batch, tensors (...) without values."""
    return {name: fake.from_tensor(tensor) for name, tensor in batch.items()}


def has_no_padding(batches: Sequence[Mapping[str, Tensor]]) -> bool:
    """Return True if the attention masks of batches, (B, T) each, are ones alone."""
    masks = [tensor for batch in batches for name, tensor in batch.items() if name.endswith("attention_mask")]
    return bool(masks) and all(bool(mask.all()) for mask in masks)


@contextmanager
def without_masks(skipped: bool) -> Iterator[None]:
    """Have models build no mask for scaled dot-product attention inside the block.

    Models skip the mask if there is nothing to mask, but checking that needs values, which fake tensors lack.

    Other threads must not run a model meanwhile: transformers has one table of mask functions per process.

    Args:
        skipped: If True, build no masks.
    """
    masks = AttentionMaskInterface()
    before = masks["sdpa"]
    if skipped:
        AttentionMaskInterface.register(
            "sdpa", lambda *given, **more: before(*given, **more | {"attention_mask": None})
        )
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", before)


def quantize(model: Any, settings: Quantization, compute: torch.dtype, whole: Collection[str]) -> list[Tensor]:
    """Put bitsandbytes' layers in place of a model's linear ones, as loading does.

    Args:
        model: A `PreTrainedModel` whose tensors are fake.
        settings: How the base is quantized.
        compute: Type that layers of 4 bits multiply in.
        whole: Names of further modules that are not quantized; they need not match.

    Returns:
        Codes of 4 bits (out * in / 2, 1) or of 8 (out, in), and their scales (blocks,) or (out,).

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    import_bitsandbytes()
    from graftwerk.modeling.quantize import choose_layers, empty_layer, quantizer

    request = quantizer(settings.name, double_quant=bool(settings.double_quant), compute=compute)
    chosen, _ = choose_layers(model, (), (*whole, *settings.skip))  # a model of fewer layers may lack some of them
    stored: list[Tensor] = []
    for path in chosen:
        layer = model.get_submodule(path)
        with unset_fake_temporarily(), torch.device("meta"):
            made = empty_layer(layer, request)
        nested, shape = bool(settings.double_quant), (made.out_features, made.in_features)  # a Conv1D's is transposed
        kept = _nf4_codes(shape, layer.weight.dtype, nested) if settings.name == "nf4" else _int8_codes(shape)
        codes, scales = kept
        made._parameters |= {"weight": codes, "bias": layer.bias}
        model.set_submodule(path, made)
        stored += [codes, *scales]
    return stored


def _nf4_codes(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> tuple[nn.Parameter, list[Tensor]]:
    """Return the codes of a weight (out, in) in nf4, (out * in / 2, 1), with bitsandbytes' state, and its scales.

    Args:
        shape: Of the weight.
        dtype: Its type.
        nested: The scales are stored in 8 bits.
    """
    from bitsandbytes.functional import quantize_4bit

    with unset_fake_temporarily():
        _, state = quantize_4bit(torch.ones(1, 64, device="cpu"), compress_statistics=nested, quant_type="nf4")
    count = math.prod(shape)
    blocks = math.ceil(count / state.blocksize)
    state.shape, state.dtype = torch.Size(shape), dtype
    state.absmax, state.code = _empty(blocks, dtype=state.absmax.dtype), _empty(16)
    scales = [state.absmax]
    if nested:
        state.offset, state.state2.code = _empty(), _empty(256)
        state.state2.absmax = _empty(math.ceil(blocks / state.state2.blocksize))
        scales.append(state.state2.absmax)
    codes = nn.Parameter(_empty(math.ceil(count / 2), 1, dtype=torch.uint8), requires_grad=False)
    codes.quant_state = state  # type: ignore[attr-defined]
    return codes, scales


def _int8_codes(shape: tuple[int, int]) -> tuple[nn.Parameter, list[Tensor]]:
    """Return the 8-bit codes of a weight, (out, in), and the scales of its rows, (out,)."""
    codes = nn.Parameter(_empty(*shape, dtype=torch.int8), requires_grad=False)
    scales = _empty(shape[0])
    codes.SCB = scales  # type: ignore[attr-defined]
    return codes, [scales]


def _empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor (...) without values, on the device that a model is built on."""
    return torch.empty(sizes, dtype=dtype, device="cpu")


class Unmoved(SingleProcess):
    """One process whose model stays where it is: tensors without values are on every device already."""

    def prepare(self, model: Any) -> Any:
        return model


class SettingWithoutValues(Setting):
    """Setting of strategies against forgetting whose batches lose their values, as the run's own do."""

    planned = True

    def batch(self, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
        with unset_fake_temporarily() as fake:
            batch = super().batch(task, examples)
        return without_values(fake, batch) if isinstance(fake, FakeTensorMode) else batch


class _RandomSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See whether an operation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen = self.seen or _is_random(func, args, kwargs)
        return func(*args, **kwargs)


def _is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return True if a call draws random numbers: attention is tagged as if it did, but draws for dropout alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("p", "dropout_p"):
            given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            return isinstance(given, Tensor) or bool(given)
    return True


class CacheWithoutValues(ActivationCache):
    """The activation cache on fake tensors: filled and checked for the memory that takes, with no values stored."""

    def _draws(self, call: Callable[[], Any]) -> bool:
        """Return True if the layers have dropout: without values two passes cannot be compared."""
        model = self.adapter.model
        with _RandomSeen() as random, torch.no_grad(), without_cache(model), modes_restored(model):
            model.train()
            reach(model, self.plan.cut, call)  # type: ignore[arg-type]
        return bool(random.seen)

    def _batch_of(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the shapes of a batch, prepared while its labels had values."""
        with unset_fake_temporarily() as fake:
            batch = super()._batch_of(examples)
        return without_values(fake, batch) if isinstance(fake, FakeTensorMode) else batch

    def _load_or_compute(self, slots: Slots, step: int) -> None:
        self._facts.update(where="nowhere", reused=False)
        self._states = torch.empty(slots.tokens, self.plan.cut.width, dtype=cache_dtype(self.settings), device="cpu")  # type: ignore[union-attr]
        lengths = [row.length for row in slots.rows]
        first, *others = chunks(lengths, ROWS, self.tokens_together)
        widest = max(others, key=lambda places: len(places) * lengths[places[0]], default=first)
        with without_gradients(self.adapter.model, self.dtype):
            for places in (first, widest):  # the longest rows, and the most tokens
                self._of([slots.rows[place] for place in places])

    def _verify(self, step: int) -> None:
        """Run both paths for their memory: there are no values to compare."""
        self._both_paths()
