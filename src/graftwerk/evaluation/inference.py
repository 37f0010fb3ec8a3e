"""Inference over many rows: no gradient, similar lengths batched together, predictions in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import ModelError
from graftwerk.methods.base_weights import all_finite
from graftwerk.methods.placement import module_device
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.tokenization import pad_further

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Told (rows done, rows in all) after every batch; what it raises ends the evaluation."""
Serve = Callable[[Sequence[Example], dict[str, Tensor]], AbstractContextManager[None]]
"""Entered around the forward pass of a batch of these rows."""


def run_model(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    on_progress: Progress | None = None,
    texts: Sequence[str] | None = None,
    serve: Serve | None = None,
) -> Predictions:
    """Run the model on all examples, and return its predictions in their order.

    Rows are worked off longest first in batches of like lengths, so that hardly anything is padding and memory runs
    out, if it does, in the first batch. The model is in evaluation mode inside and as it was afterwards.

    Args:
        model: On the device it is to compute on; whatever adapters are active on it are part of the answer.
        task: The task, which collates batches and decodes outputs.
        examples: Encoded rows, with or without targets. The loss is the mean over all targets, or None if a row has no
            target, or no row has a trained token.
        tokenizer: The model's tokenizer.
        batch_size: Rows a forward pass.
        dtype: What products are computed in; anything but float32 means autocast.
        on_progress: Called with (rows done, rows in all).
        texts: What was generated for each row, where the task generates and was asked to.
        serve: Entered around each forward pass, with its rows: what they have in common with earlier ones may be kept.
    """
    answers: list[Tensor | None] = [None] * len(examples)
    losses: list[float] = []
    weights: list[float] = []
    done, longest = 0, max((example.length for example in examples), default=0)
    with evaluation_mode(model), without_cache(model), torch.inference_mode(), autocast(model, dtype):
        for rows in batches_of(examples, batch_size):
            chosen = [examples[row] for row in rows]
            prepared = task.objective.prepare(collated(task, chosen, tokenizer, dtype, longest), model)
            batch = to_device(prepared, model)
            with nullcontext() if serve is None else serve(chosen, batch):
                outputs = task.objective.forward(model, batch)
            if "labels" in batch:
                losses.append(float(task.objective.loss(outputs, batch)))
                weights.append(task.objective.num_targets(prepared))
            answered = task.objective.per_row_outputs(outputs, batch)
            for place, row in enumerate(rows):
                answers[row] = answered[place : place + 1]
            if on_progress is not None:
                done += len(rows)
                on_progress(done, len(examples))
    targets = [example.target for example in examples]
    known = len(examples) > 0 and all(target is not None for target in targets)
    total = sum(weights)
    loss = sum(x * w for x, w in zip(losses, weights, strict=True)) / total if known and total else None
    return task.decoder.predictions([answer for answer in answers if answer is not None], examples, loss, texts)


def batches_of(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Return the rows of each forward pass, longest first."""
    order = sorted(range(len(examples)), key=lambda row: examples[row].length, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collated(
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    longest: int,
    *,
    training: bool = False,
) -> dict[str, Tensor]:
    """Return examples as a batch, (B, T) each, on the host.

    Args:
        task: The task, which collates.
        examples: At least one.
        tokenizer: The model's tokenizer.
        dtype: Compute type; if it has 16 bits, T is rounded up (`tasks.tokenization.pad_further`).
        longest: Length in tokens of the longest row in any batch.
        training: Collate for a training step.
    """
    batch = (task.collator.collate_training if training else task.collator.collate)(examples, tokenizer)
    return batch if dtype == torch.float32 else pad_further(batch, longest, tokenizer)


def to_device(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the batch, tensors of any shape, on the device that the model reads it on."""
    return moved(batch, device_of(model))


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch, tensors of any shape, on a device; the host goes on while they are copied.

    CUDA copies at the same time as it computes only from pinned memory.
    """
    if device.type == "cuda":
        batch = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's first layer computes on, whether its weights are there or offloaded."""
    return module_device(model)


def autocast(where: Any, dtype: torch.dtype, *, cache: bool = True) -> AbstractContextManager[Any]:
    """Return the context in which products are computed in ``dtype``; for float32 it does nothing.

    Args:
        where: The model, or the device that it computes on.
        dtype: What products are computed in.
        cache: Let torch use a weight that it has cast again within the outermost context: not if the weight changes.
    """
    if dtype == torch.float32:
        return nullcontext()
    device = where if isinstance(where, torch.device) else device_of(where)
    return torch.autocast(device.type, dtype, cache_enabled=cache)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def without_gradients(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Run a model as in evaluation, without gradients and stored keys, for values that training may read too.

    Args:
        model: The model, which is in the mode it was in afterwards.
        dtype: What products are computed in.
    """
    with evaluation_mode(model), without_cache(model), torch.no_grad(), autocast(model, dtype):
        yield


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Keep a model from storing keys and values of every layer, which only generation reads again."""
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache:
        model.config.use_cache = False
    try:
        yield
    finally:
        if use_cache:
            model.config.use_cache = use_cache


def refuse_broken_base(model: nn.Module, *, trained: bool = False) -> None:
    """Raise where weights that no training has touched are not finite: no setting of a training mends that.

    Args:
        model: The base with its adapter.
        trained: Look at the weights that train as well: nothing has been changed in them yet.

    Raises:
        ModelError: naming the first such weight.
    """
    names = [
        name
        for name, weight in model.named_parameters()
        if (trained or not weight.requires_grad) and weight.is_floating_point() and not all_finite(weight)
    ]
    if names:
        raise ModelError(
            f"{len(names):,} weights of the base model hold NaN or infinity, `{names[0]}` among them",
            where=str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model"),
            hint="fetch the base again, or use another one: with these weights no training and no setting can help",
        )
