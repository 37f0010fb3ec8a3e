"""One training step and one evaluation batch on tensors without values: every allocation, in order.

The model is built from its configuration under torch's `FakeTensorMode`, the method is attached, and the trainer's own
gradient and optimizer code runs on the longest rows there are. A dispatch mode sees each tensor that an operation makes
and its end; so the bytes are those of a real step, allocation by allocation, except for scratch memory inside of
kernels and for what the allocator does with freed blocks (`allocator`).
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from graftwerk.config import RunConfig
from graftwerk.modeling.attach import attach
from graftwerk.training.distributed.single import SingleProcess
from graftwerk.training.setup import Prepared


@dataclass(frozen=True)
class StepTrace:
    """Bytes of a run, part by part.

    Attributes:
        weights: All parameters and buffers before the method is attached.
        trained: Trained parameters.
        optimizer: State of the optimizer.
        gradients: Gradients of the trained parameters.
        kept: What the forward pass of one micro-batch keeps for the backward pass, up to the model's output.
        step_peak: Most bytes alive at any moment of a step, without ``weights``.
        evaluation_peak: The same of an evaluation batch.
        operations: Floating-point operations of a step.
        moved: Bytes that the operations of a step write.
        calls: Operations of a step that compute something.
        loaded: Number of the allocations that are the model as it is loaded: those of ``events`` come first.
        events: All allocations, of a step and an evaluation batch: a size in bytes, or minus the number (from 1) of the
            allocation that is freed.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    kept: int
    step_peak: int
    evaluation_peak: int
    operations: int
    moved: int
    calls: int
    loaded: int
    events: array[int] = field(repr=False)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all storages that operations make while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.peak, self.moved, self.calls = 0, 0, 0, 0
        self.events: array[int] = array("q")
        self.made = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.alive)
        return made

    def add(self, tensor: Tensor) -> None:
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
        self._known[number] = weakref.ref(storage, self._forgetting(number, size, self.made))

    def _forgetting(self, number: int, size: int, made: int) -> Any:
        def forget(_: Any) -> None:
            self._known.pop(number, None)
            self.alive -= size
            self.events.append(-made)

        return forget

    @contextmanager
    def stretch(self) -> Iterator[_Meter]:
        """Count anew, from the bytes that are alive now."""
        self.peak, self.moved, self.calls = self.alive, 0, 0
        yield self


class _Unmoved(SingleProcess):
    """One process whose model stays where it is: tensors without values are on every device already."""

    def prepare(self, model: Any) -> Any:
        return model


def trace_step(config: RunConfig, prepared: Prepared, architecture: Any, dtype: torch.dtype, folder: Path) -> StepTrace:
    """Trace a training step and an evaluation batch of a run on its longest rows.

    Args:
        config: Settings of the run.
        prepared: Its rows, task, method and tokenizer.
        architecture: The model's configuration, with the task's settings.
        dtype: Type that forward passes compute in.
        folder: A folder that does not exist; nothing is written into it.

    Raises:
        UnsupportedError: The method does not support this architecture.
        ConfigError: A target matches nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from graftwerk.evaluation.inference import evaluation_mode
    from graftwerk.models.positions import fix_padding
    from graftwerk.training import optim
    from graftwerk.training.checkpoint import Checkpoints
    from graftwerk.training.mode import training_mode
    from graftwerk.training.trainer import Trainer

    fake, meter = FakeTensorMode(allow_non_fake_inputs=True), _Meter()
    task, examples, training = prepared.task, prepared.examples["train"], config.training
    with torch.random.fork_rng(devices=[]), fake, meter:
        model = task.auto_class().from_config(architecture).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        fix_padding(model, prepared.tokenizer)
        weights = sum(size for size in _storages([*model.parameters(), *model.buffers()]))
        loaded = meter.made
        adapter = attach(model, prepared.method)
        trainer = Trainer(
            adapter,
            task,
            prepared.tokenizer,
            examples,
            prepared.examples["validation"],
            training,
            checkpoints=Checkpoints(folder),
            dtype=dtype,
            distributed=_Unmoved(torch.device("cpu")),
            max_length=prepared.max_length,
            labels=prepared.splits.labels or (),
        )
    lengths = trainer.batch_sampler.lengths
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    with torch.random.fork_rng(devices=[]):
        step = trainer.gradients.prepare(longest[: trainer.rows_per_step], trainer.state.micro_batch)
        rows = [examples[row] for row in longest[: training.per_device_eval_batch_size]]
        held_out = task.objective.prepare(task.collator.collate(rows, prepared.tokenizer), model)
    step = replace(step, batches=[_without_values(fake, batch) for batch in step.batches])
    held_out = _without_values(fake, held_out)
    kept: list[int] = []
    flops = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=[]), fake, meter, training_mode(model, training.gradient_checkpointing):
        handle = model.register_forward_hook(lambda *_: kept.append(meter.alive))
        with flops, meter.stretch():
            start = meter.alive
            gradient = trainer.gradients.of(step)
            optim.step_if(trainer.optimizer, gradient.finite)
            step_peak, moved, calls = meter.peak, meter.moved, meter.calls
        handle.remove()
        del gradient
    trainer.optimizer.zero_grad()
    with torch.random.fork_rng(devices=[]), fake, meter, evaluation_mode(model), torch.no_grad():
        with meter.stretch():
            outputs = task.objective.forward(model, held_out)
            evaluation_peak = meter.peak
        del outputs
    parameters = list(adapter.parameters())
    trained = sum(_storages(parameters))
    return StepTrace(
        weights=weights,
        trained=trained,
        optimizer=2 * trained,
        gradients=trained,
        kept=max(kept, default=start) - start,
        step_peak=step_peak - weights,
        evaluation_peak=evaluation_peak - weights,
        operations=flops.get_total_flops(),
        moved=moved,
        calls=calls,
        loaded=loaded,
        events=meter.events,
    )


def _storages(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Yield the bytes of each storage that the tensors lie in, once."""
    seen: dict[int, int] = {id(one.untyped_storage()): one.untyped_storage().nbytes() for one in tensors}
    yield from seen.values()


def _without_values(fake: FakeTensorMode, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shapes of a batch, tensors (...) without values."""
    return {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
