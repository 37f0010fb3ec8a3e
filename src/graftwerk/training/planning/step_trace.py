"""One training step and one evaluation batch on tensors without values: every allocation, in order.

The model is built from its configuration under torch's `FakeTensorMode`, the method is attached, and the trainer's own
gradient and optimizer code runs on the longest rows there are. A dispatch mode sees each tensor that an operation makes
and its end; so the bytes are those of a real step, allocation by allocation, except for scratch memory inside of
kernels and for what the allocator does with freed blocks (`allocator`).
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from graftwerk.config import RunConfig
from graftwerk.evaluation.inference import without_cache
from graftwerk.modeling.attach import attach_from_tensors
from graftwerk.tasks.base import Example
from graftwerk.training.activation_cache.cache import MOST_TOKENS, TOKENS_BY_DEVICE
from graftwerk.training.planning.meter import Meter
from graftwerk.training.planning.step_time import StepWork
from graftwerk.training.planning.without_values import (
    CacheWithoutValues,
    SettingWithoutValues,
    Unmoved,
    has_no_padding,
    quantize,
    without_masks,
    without_values,
)
from graftwerk.training.setup import Prepared, training_data
from graftwerk.training.stream import EncodedStream

TRACED = 2
"""Micro-batches of a step that are traced; all further ones repeat the last."""


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
        filling_peak: The same of the pass that fills the activation cache, and of its check; 0 without a cache.
        rows: Rows of the largest traced micro-batch.
        codes: Bytes of ``weights`` in codes of quantized layers, and in their scales.
        evaluated: Operations of a token in evaluation.
        products: Distinct matrix products in 16 bits of the traced micro-batches whose shapes depend on the sequence
            length.
        evaluated_products: Those of an evaluation batch.
        fixed_products: Products of both whose shapes do not.
        setup: Number of the allocations and ends in ``events`` before the step: the model, the optimizer, the cache.
        loaded: Number of the allocations that are the model as it is loaded: those of ``events`` come first.
        events: All allocations of the set-up and a step: a size in bytes, or minus the number (from 1) of the
            allocation that is freed.
        evaluation: Those of an evaluation batch, counted on.
        work: The operations of the step.
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
    filling_peak: int
    rows: int
    codes: int
    evaluated: int
    products: int
    evaluated_products: int
    fixed_products: int
    setup: int
    loaded: int
    events: array[int] = field(repr=False)
    evaluation: array[int] = field(repr=False)
    work: StepWork = field(repr=False)
    recorded: bytes = field(repr=False)


def trace_step(
    config: RunConfig,
    prepared: Prepared,
    architecture: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    kind: str = "cpu",
) -> StepTrace:
    """Trace a training step and an evaluation batch of a run on its longest rows.

    Args:
        config: Settings of the run.
        prepared: Its rows, task, method and tokenizer.
        architecture: The model's configuration, with the task's settings.
        folder: A folder that does not exist; nothing is written into it.
        dtype: Type that forward passes compute in.
        weights_dtype: Type that the base is loaded in.
        kind: Kind of the device that trains.

    Raises:
        UnsupportedError: The method does not support this architecture.
        ConfigError: A target matches nothing.
    """
    from graftwerk.evaluation.inference import autocast, batches_of, collated, evaluation_mode
    from graftwerk.models.positions import fix_padding
    from graftwerk.training import optim
    from graftwerk.training.checkpoint import Checkpoints
    from graftwerk.training.mode import training_mode
    from graftwerk.training.retained import RetainedMeter
    from graftwerk.training.retention.begin import retention_of
    from graftwerk.training.trainer import Trainer
    from graftwerk.training.trainer_inputs import RunContext

    fake, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
    task, training = prepared.task, config.training
    validation = prepared.examples["validation"]
    with ExitStack() as modes:
        modes.enter_context(torch.random.fork_rng(devices=[]))
        modes.enter_context(fake)
        modes.enter_context(meter)
        model = task.auto_class().from_config(architecture, dtype=weights_dtype).eval()
        codes = _quantized(model, config, dtype)
        for tensor in (*model.parameters(), *model.buffers(), *codes):
            meter.add(tensor)
        fix_padding(model, prepared.tokenizer)
        weights, loaded = sum(_storages([*model.parameters(), *model.buffers(), *codes])), meter.made
        adapter = attach_from_tensors(model, prepared.method, "default", None)
        trainer = Trainer(
            adapter,
            task,
            prepared.tokenizer,
            training_data(prepared),
            training,
            RunContext(Checkpoints(folder)),
            dtype=dtype,
            distributed=Unmoved(torch.device("cpu")),
        )
        if training.retain is not None:
            with unset_fake_temporarily():  # heads of earlier runs are read from their files
                retained = RetainedMeter(prepared.retained, adapter, trainer.evaluate, config.evaluation, "")
            retention_of(config, prepared, trainer, retained, SettingWithoutValues)
        cache = trainer.activation_cache
        cache.__class__ = CacheWithoutValues
        cache.tokens_together = TOKENS_BY_DEVICE.get(kind, MOST_TOKENS)
        meter.restart()
        train = prepared.examples["train"]
        alike = _have_one_length(train), _have_one_length(validation or train)
        with without_masks(all(alike) and dtype == torch.float32):  # batches in 16 bits are padded further
            cache.open(trainer.train, validation, trainer.total_steps * trainer.rows_per_step / len(trainer.train), 0)
    cached = 0 if cache._states is None else cache._states.untyped_storage().nbytes()
    filling_peak = meter.peak - weights if cached else 0
    examples = trainer.batch_sampler.part(0)
    longest = sorted(range(len(examples)), key=lambda row: -examples[row].length)
    micro, size = trainer.state.micro_batch, training.eval_batch_size
    held_out = [validation[row] for row in next(iter(batches_of(validation, size)), [])]
    held_out = held_out or [examples[row] for row in longest[:size]]
    with torch.random.fork_rng(devices=[]):
        step = trainer.gradients.batches.prepare(longest[: min(trainer.rows_per_step, TRACED * micro)], micro)
        most = max((example.length for example in validation), default=0)
        batch = task.objective.prepare(collated(task, held_out, prepared.tokenizer, dtype, most), model)
    shapes = [next(iter(batch.values())).shape for batch in step.batches]
    full = [whole and has_no_padding(of) for whole, of in zip(alike, (step.batches, [batch]), strict=True)]
    step = replace(step, batches=[without_values(fake, batch) for batch in step.batches])
    batch = without_values(fake, batch)
    setup = len(meter.events)
    kept: list[int] = []
    handle = model.register_forward_hook(lambda *_: kept.append(meter.alive))
    with torch.random.fork_rng(devices=[]), fake, meter, training_mode(model, training.gradient_checkpointing):
        meter.restart()
        start = meter.alive
        with without_masks(full[0]):
            gradient = trainer.gradients.accumulate(step)
        work, meter.work = meter.work, {}
        optim.step_if(trainer.optimizer, gradient.finite)
        step_peak, products = meter.peak, _by_length(meter.products, step.batches)
        fixed = meter.products - products
        update = meter.work
    handle.remove()
    del gradient
    trainer.optimizer.zero_grad()
    stepped = len(meter.events)
    rows, width = next(iter(batch.values())).shape[:2]
    with torch.random.fork_rng(devices=[]), fake, meter, evaluation_mode(model), without_cache(model), torch.no_grad():
        meter.restart()
        with autocast(model, dtype):
            with cache.serving(held_out, batch), without_masks(full[1]):
                outputs = task.objective.forward(model, batch)
            if "labels" in batch:
                task.objective.loss(outputs, batch)
        evaluation_peak, evaluated = meter.peak, meter.operations
        evaluated_products = _by_length(meter.products, [batch])
        fixed |= meter.products - evaluated_products
        del outputs
    trained = sum(_storages(list(adapter.parameters())))
    return StepTrace(
        weights=weights,
        trained=trained,
        optimizer=2 * trained,
        gradients=trained,
        cached=cached,
        kept=max(kept, default=start) - start,
        step_peak=step_peak - weights,
        evaluation_peak=evaluation_peak - weights,
        filling_peak=filling_peak,
        rows=max(map(len, step.examples)),
        codes=sum(_storages(codes)),
        evaluated=evaluated // (rows * width),
        products=len(products),
        evaluated_products=len(evaluated_products),
        fixed_products=len(fixed),
        setup=setup,
        loaded=loaded,
        events=meter.events[:stepped],
        evaluation=meter.events[stepped:],
        work=StepWork(
            work,
            update,
            tokens=sum(shape[0] * shape[1] for shape in shapes),
            squares=sum(shape[0] * shape[1] ** 2 for shape in shapes),
            micro_batches=len(shapes),
        ),
        recorded=bytes(meter.recorded),
    )


def _have_one_length(examples: Sequence[Example]) -> bool:
    """Return True if no batch of these rows can have padding; rows of a stream are not read for it."""
    return not isinstance(examples, EncodedStream) and len({example.length for example in examples}) == 1


def _by_length(products: set[Any], batches: Sequence[Mapping[str, Tensor]]) -> set[Any]:
    """Return the products whose shapes depend on the sequence length: all but those over one token per row.

    Args:
        products: Operation, sizes and strides of the operands of each.
        batches: Batches that they are of; tensors are (B, T), labels (B, A).
    """
    shapes = [tensor.shape for batch in batches for tensor in batch.values() if tensor.dim() == 2]
    rows, lengths = {shape[0] for shape in shapes}, {size for rows, one in shapes for size in (one, rows * one)}

    def is_fixed(product: Any) -> bool:
        sizes = {size for operand, _ in product[1:] for size in operand}
        return bool(sizes & rows) and not sizes & lengths

    return {product for product in products if not is_fixed(product)}


def shallower(architecture: Any, layers: int) -> Any:
    """Return the configuration of the same model with fewer layers in each of its stacks."""
    shallow = copy.deepcopy(architecture)
    whole = int(architecture.num_hidden_layers)
    for name, value in list(vars(shallow).items()):
        if isinstance(value, list) and len(value) == whole:  # what each layer is
            setattr(shallow, name, value[:layers])
    shallow.num_hidden_layers = layers
    for name in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(shallow, name, None), int):
            setattr(shallow, name, layers)
    return shallow


def _quantized(model: Any, config: RunConfig, compute: torch.dtype) -> list[Tensor]:
    """Quantize the layers of a model that are quantized as it is loaded, and return their codes and scales."""
    if (settings := config.quantization) is None:
        return []
    from graftwerk.models.hardware import TYPES

    saved = () if config.method.modules_to_save == "auto" else config.method.modules_to_save
    return quantize(model, settings, TYPES.get(settings.compute_type, compute), saved)


def _storages(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Yield the bytes of each storage that the tensors lie in, once."""
    seen: dict[int, int] = {id(one.untyped_storage()): one.untyped_storage().nbytes() for one in tensors}
    yield from seen.values()
