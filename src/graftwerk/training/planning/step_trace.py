"""One training step and one evaluation batch on tensors without values: every allocation, in order.

The model is built from its configuration under torch's `FakeTensorMode`, the method is attached, and the trainer's own
gradient and optimizer code runs on the longest rows there are. A dispatch mode sees each tensor that an operation makes
and its end; so the bytes are those of a real step, allocation by allocation, except for scratch memory inside of
kernels and for what the allocator does with freed blocks (`allocator`).
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from graftwerk.config import RunConfig
from graftwerk.evaluation.inference import without_cache
from graftwerk.modeling.attach import attach
from graftwerk.modeling.frozen_layers import reach
from graftwerk.modeling.module_index import modes_restored
from graftwerk.tasks.base import Example, Task
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.activation_cache.plan import cache_dtype
from graftwerk.training.activation_cache.rows import Slots
from graftwerk.training.distributed.single import SingleProcess
from graftwerk.training.retention.base import Setting
from graftwerk.training.setup import Prepared, training_data

TRACED = 2
"""Micro-batches of a step that are traced; all further ones repeat the last."""
_ATEN: Any = torch.ops.aten
_PRODUCTS = frozenset((_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm))
_LINEAR = frozenset((_ATEN.mm, _ATEN.addmm, _ATEN.convolution, _ATEN.convolution_backward))
"""Operations that grow with the tokens; the other counted ones are attention's, and grow with rows times length^2."""


def _attention(*args: Any, out_val: Any, **_: Any) -> Any:
    return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))  # type: ignore[no-untyped-call]


def _attention_backward(*args: Any, out_val: Any, **_: Any) -> Any:
    return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))  # type: ignore[no-untyped-call]


_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class StepTrace:
    """Bytes of a run, part by part.

    Attributes:
        weights: All parameters and buffers before the method is attached.
        trained: Trained parameters.
        optimizer: State of the optimizer.
        gradients: Gradients of the trained parameters.
        cached: Hidden states of frozen layers in the activation cache.
        kept: What the forward pass of one micro-batch keeps for the backward pass, up to the model's output.
        step_peak: Most bytes alive at any moment of a step, without ``weights``.
        evaluation_peak: The same of an evaluation batch.
        operations: Floating-point operations of the traced micro-batches.
        attention: Those of them that grow with the square of the length.
        moved: Bytes that the operations of the traced micro-batches write.
        calls: Their operations that compute something.
        micro_batches: Number of traced micro-batches.
        rows: Rows of the largest of them.
        quantizable: Bytes of ``weights`` in linear layers that a quantized base stores as codes.
        widest: Bytes of the largest of them, which is decoded whole.
        largest: Bytes of the largest trained parameter.
        tokens: Tokens of the traced micro-batches, padding included.
        squares: Sum of rows times squared length over the traced micro-batches.
        evaluated: Operations of a token in evaluation.
        products: Matrix products of different shapes in 16 bits that the traced micro-batches have.
        evaluated_products: Those of an evaluation batch.
        setup: Number of the allocations and ends in ``events`` before the step: the model, the optimizer, the cache.
        loaded: Number of the allocations that are the model as it is loaded: those of ``events`` come first.
        events: All allocations of the set-up and a step: a size in bytes, or minus the number (from 1) of the
            allocation that is freed.
        evaluation: Those of an evaluation batch, counted on.
        recorded: For each allocation, in their order, 1 if autograd recorded the operation that made it, else 0.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    cached: int
    kept: int
    step_peak: int
    evaluation_peak: int
    operations: int
    attention: int
    moved: int
    calls: int
    micro_batches: int
    rows: int
    quantizable: int
    widest: int
    largest: int
    tokens: int
    squares: int
    evaluated: int
    products: int
    evaluated_products: int
    setup: int
    loaded: int
    events: array[int] = field(repr=False)
    evaluation: array[int] = field(repr=False)
    recorded: bytes = field(repr=False)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all storages that operations make while they live, and the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.made = 0, 0
        self.events: array[int] = array("q")
        self.recorded = bytearray()
        self._known: dict[int, weakref.ref[Any]] = {}
        self.restart()

    def restart(self) -> None:
        """Count anew, from the bytes that are alive now."""
        self.peak, self.moved, self.calls, self.operations, self.attention = self.alive, 0, 0, 0, 0
        self.products: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if formula := _FORMULAS.get(func._overloadpacket):
            count = int(formula(*args, **kwargs, out_val=made))
            self.operations += count
            self.attention += count if func._overloadpacket not in _LINEAR else 0
            if func._overloadpacket in _PRODUCTS and made.itemsize == 2:
                self.products.add(
                    (func, *(tuple(each.shape) + each.stride() for each in args if isinstance(each, Tensor)))
                )
        recorded = torch._C._current_graph_task_id() != -1 or (
            torch.is_grad_enabled()
            and any(isinstance(each, Tensor) and each.requires_grad for each in tree_iter((args, kwargs)))
        )
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self.add(tensor, recorded)
        self.peak = max(self.peak, self.alive)
        return made

    def add(self, tensor: Tensor, recorded: bool = False) -> None:
        """Count the storage of a tensor, any shape, unless it is known."""
        storage = tensor.untyped_storage()
        number = id(storage)
        if (known := self._known.get(number)) is not None and known() is storage:
            return
        size = storage.nbytes()
        self.made += 1
        self.alive += size
        self.moved += size
        self.calls += 1
        self.events.append(size)
        self.recorded.append(recorded)
        self._known[number] = weakref.ref(storage, self._forgetting(number, size, self.made))

    def _forgetting(self, number: int, size: int, made: int) -> Any:
        def forget(_: Any) -> None:
            self._known.pop(number, None)
            self.alive -= size
            self.events.append(-made)

        return forget


class _Unmoved(SingleProcess):
    """One process whose model stays where it is: tensors without values are on every device already."""

    def prepare(self, model: Any) -> Any:
        return model


class _SettingWithoutValues(Setting):
    """Setting of strategies against forgetting whose batches lose their values, as the run's own do."""

    planned = True

    def batch(self, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
        with unset_fake_temporarily() as fake:
            batch = super().batch(task, examples)
        return _without_values(fake, batch) if isinstance(fake, FakeTensorMode) else batch


class _RandomSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See whether an operation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _CacheWithoutValues(ActivationCache):
    """The activation cache with hidden states that are not computed."""

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
        return _without_values(fake, batch) if isinstance(fake, FakeTensorMode) else batch

    def _load_or_compute(self, slots: Slots, step: int) -> None:
        self._facts.update(where="nowhere", reused=False)
        self._states = torch.empty(slots.tokens, self.plan.cut.width, dtype=cache_dtype(self.settings), device="cpu")  # type: ignore[union-attr]

    def _verify(self, slots: Slots, step: int) -> None:
        """Do nothing: there are no values to compare."""


def trace_step(
    config: RunConfig,
    prepared: Prepared,
    architecture: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> StepTrace:
    """Trace a training step and an evaluation batch of a run on its longest rows.

    Args:
        config: Settings of the run.
        prepared: Its rows, task, method and tokenizer.
        architecture: The model's configuration, with the task's settings.
        folder: A folder that does not exist; nothing is written into it.
        dtype: Type that forward passes compute in.
        weights_dtype: Type that the base is loaded in.

    Raises:
        UnsupportedError: The method does not support this architecture.
        ConfigError: A target matches nothing.
    """
    from graftwerk.evaluation.inference import autocast, batches_of, evaluation_mode
    from graftwerk.models.positions import fix_padding
    from graftwerk.training import optim
    from graftwerk.training.checkpoint import Checkpoints
    from graftwerk.training.mode import training_mode
    from graftwerk.training.retained import RetainedMeter
    from graftwerk.training.retention.begin import retention_of
    from graftwerk.training.trainer import Trainer
    from graftwerk.training.trainer_inputs import RunContext

    fake, meter = FakeTensorMode(allow_non_fake_inputs=True), _Meter()
    task, training = prepared.task, config.training
    validation = prepared.examples["validation"]
    with ExitStack() as modes:
        modes.enter_context(torch.random.fork_rng(devices=[]))
        modes.enter_context(fake)
        modes.enter_context(meter)
        model = task.auto_class().from_config(architecture, dtype=weights_dtype).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        fix_padding(model, prepared.tokenizer)
        linear = _quantized(model, config)
        weights, loaded = sum(_storages([*model.parameters(), *model.buffers()])), meter.made
        adapter = attach(model, prepared.method)
        trainer = Trainer(
            adapter,
            task,
            prepared.tokenizer,
            training_data(prepared),
            training,
            RunContext(Checkpoints(folder)),
            dtype=dtype,
            distributed=_Unmoved(torch.device("cpu")),
        )
        if training.retain is not None:
            with unset_fake_temporarily():  # heads of earlier runs are read from their files
                retained = RetainedMeter(prepared.retained, adapter, trainer.evaluate, config.evaluation, "")
            retention_of(config, prepared, trainer, retained, _SettingWithoutValues)
        cache = trainer.activation_cache
        cache.__class__ = _CacheWithoutValues
        cache.open(trainer.train, validation, trainer.total_steps * trainer.rows_per_step / len(trainer.train), 0)
    cached = 0 if cache._states is None else cache._states.untyped_storage().nbytes()
    examples = trainer.batch_sampler.part(0)
    longest = sorted(range(len(examples)), key=lambda row: -examples[row].length)
    micro, size = trainer.state.micro_batch, training.per_device_eval_batch_size
    held_out = [validation[row] for row in next(iter(batches_of(validation, size)), [])]
    held_out = held_out or [examples[row] for row in longest[:size]]
    with torch.random.fork_rng(devices=[]):
        step = trainer.gradients.batches.prepare(longest[: min(trainer.rows_per_step, TRACED * micro)], micro)
        batch = task.objective.prepare(task.collator.collate(held_out, prepared.tokenizer), model)
    shapes = [next(iter(batch.values())).shape for batch in step.batches]
    step = replace(step, batches=[_without_values(fake, batch) for batch in step.batches])
    batch = _without_values(fake, batch)
    setup = len(meter.events)
    kept: list[int] = []
    handle = model.register_forward_hook(lambda *_: kept.append(meter.alive))
    with torch.random.fork_rng(devices=[]), fake, meter, training_mode(model, training.gradient_checkpointing):
        meter.restart()
        start = meter.alive
        gradient = trainer.gradients.accumulate(step)
        optim.step_if(trainer.optimizer, gradient.finite)
        step_peak, moved, calls = meter.peak, meter.moved, meter.calls
        operations, attention, products = meter.operations, meter.attention, len(meter.products)
    handle.remove()
    del gradient
    trainer.optimizer.zero_grad()
    stepped = len(meter.events)
    with torch.random.fork_rng(devices=[]), fake, meter, evaluation_mode(model), without_cache(model), torch.no_grad():
        meter.restart()
        with autocast(model, dtype):
            with cache.serving(held_out, batch):
                outputs = task.objective.forward(model, batch)
            if "labels" in batch:
                task.objective.loss(outputs, batch)
        evaluation_peak, evaluated = meter.peak, meter.operations
        del outputs
    rows, width = next(iter(batch.values())).shape[:2]
    tokens = sum(shape[0] * shape[1] for shape in shapes)
    sizes = list(_storages(list(adapter.parameters())))
    trained = sum(sizes)
    return StepTrace(
        weights=weights,
        trained=trained,
        optimizer=2 * trained,
        gradients=trained,
        cached=cached,
        kept=max(kept, default=start) - start,
        step_peak=step_peak - weights,
        evaluation_peak=evaluation_peak - weights,
        operations=operations,
        attention=attention,
        moved=moved,
        calls=calls,
        micro_batches=len(shapes),
        rows=max(map(len, step.examples)),
        quantizable=sum(linear.values()),
        widest=max(linear.values(), default=0),
        largest=max(sizes, default=0),
        tokens=tokens,
        squares=sum(shape[0] * shape[1] ** 2 for shape in shapes),
        evaluated=evaluated // (rows * width),
        products=products,
        evaluated_products=len(meter.products),
        setup=setup,
        loaded=loaded,
        events=meter.events[:stepped],
        evaluation=meter.events[stepped:],
        recorded=bytes(meter.recorded),
    )


def _quantized(model: Any, config: RunConfig) -> dict[str, int]:
    """Return the bytes of the weight of each linear layer that is quantized as the model is loaded, by path."""
    if config.quantization is None:
        return {}
    from graftwerk.modeling.quantize import choose_layers

    saved = () if config.method.modules_to_save == "auto" else config.method.modules_to_save
    chosen, _ = choose_layers(model, (), (*saved, *config.quantization.skip))  # one traced less deep lacks some
    return {path: model.get_submodule(path).weight.nbytes for path in chosen}


def _storages(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Yield the bytes of each storage that the tensors lie in, once."""
    seen: dict[int, int] = {id(one.untyped_storage()): one.untyped_storage().nbytes() for one in tensors}
    yield from seen.values()


def _without_values(fake: FakeTensorMode, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shapes of a batch, tensors (...) without values."""
    return {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
