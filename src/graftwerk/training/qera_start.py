"""QERA initialization at the start of a run: training rows show which inputs matter.

Errors are collected while the base is quantized (`modeling.quantize`), a pass over training rows measures the inputs of
each adapted layer, and `methods.qera` computes the factors. None of this is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, DivergedError
from graftwerk.evaluation.inference import moved, refuse_broken_base, without_gradients
from graftwerk.methods.base_weights import all_finite
from graftwerk.methods.lora import LoRAModule
from graftwerk.methods.qera import qera_init
from graftwerk.modeling.module_index import base_modules
from graftwerk.training import rng
from graftwerk.training.events import Event
from graftwerk.training.validation import StopEvaluation

if TYPE_CHECKING:
    from graftwerk.modeling.quantize import QuantizationErrors
    from graftwerk.training.trainer import Trainer

ROWS = 128
"""Maximum number of training rows used to measure inputs."""


def errors_for(settings: RunConfig, *, resumed: bool) -> QuantizationErrors | None:
    """Return a store for the quantization errors, or None if the run does not use them.

    Args:
        settings: Settings of the run.
        resumed: True if a checkpoint has the factors. What is retained is still measured at the run's start, and
            strategies against forgetting begin there.
    """
    training = settings.training
    if not settings.method.starts_from_errors or training.warm_start is not None:
        return None
    if resumed and training.retain is None and not settings.evaluation.retained:
        return None
    from graftwerk.modeling.quantize import QuantizationErrors

    return QuantizationErrors()


@torch.no_grad()
def start_from_errors(trainer: Trainer, errors: QuantizationErrors) -> None:
    """Set the factors of a new LoRA to QERA's, the same on all processes; the errors are released.

    A layer that no row reaches (a decoder's, in a task that only encodes) keeps the factors that were drawn.

    Args:
        trainer: The training, at step 0.
        errors: Quantization errors of the base's weights.

    Raises:
        ConfigError: No adapted layer is quantized.
        DivergedError: The inputs of a layer are not finite.
        StopEvaluation: A stop was requested.
    """
    adapter, processes = trainer.adapter, trainer.distributed
    low_rank = {path: module for path, module in adapter.modules() if type(module) is LoRAModule}
    layers = {path: module for path, module in low_rank.items() if path in errors}
    if not layers:
        raise ConfigError(
            "init_lora_weights=qera has nothing to correct: none of the adapted layers is quantized",
            where="method.target_modules",
            hint="quantization.skip=[], other targets, or method.init_lora_weights=true",
        )
    if others := [path for path in low_rank if path not in layers]:
        counts = f"{len(others)} of {len(low_rank)} adapted layers are not quantized"
        text = f"{counts} and use LoRA's default initialization: {others[0]}"
        trainer.emit(Event("warning", 0, text=text if len(others) == 1 else f"{text} and others"))
    trainer.emit(Event("phase", 0, name=f"measuring the inputs of {len(layers)} quantized layers"))
    with rng.untouched(trainer.device):
        torch.manual_seed(trainer.settings.seed)  # the same decomposition on all processes
        mean_squares = measure_inputs(trainer, layers)
        torch.manual_seed(trainer.settings.seed)
        for path, module in layers.items():
            _check_stop(trainer)
            error = errors.take(path)  # (out, in)
            if (mean_square := mean_squares.get(path)) is None:
                continue
            if not all_finite(mean_square):
                refuse_broken_base(adapter.model)
                raise DivergedError(f"the inputs of `{path}` are not finite", hint="training.compute_type=float32")
            a, b = module.lora_A.weight, module.lora_B.weight
            started = qera_init(error, mean_square.to(error.device), a, b, module.scale)
            for factor, value in zip((a, b), started, strict=True):
                factor.copy_(processes.sum(value if processes.is_main else torch.zeros_like(value)))
    errors.clear()


def measure_inputs(trainer: Trainer, layers: Mapping[str, LoRAModule]) -> dict[str, Tensor]:
    """Return the mean squared entries, (in,), of the inputs that each layer has on some training rows.

    The rows are evenly spaced: files may be sorted, and several data sets follow each other. Each row is a batch of its
    own, so that no padding is counted; processes share the rows.

    Args:
        trainer: The training.
        layers: The adapted layers' LoRA modules by path.
    """
    processes, model = trainer.distributed, trainer.adapter.model
    spaced = range(0, len(trainer.train), -(-len(trainer.train) // ROWS))
    rows = [trainer.train[row] for row in spaced[processes.rank :: processes.world_size]]
    modules = base_modules(model)
    sums: dict[str, Tensor] = {}  # (in + 1,) each: squares by entry, then the number of inputs
    for path, layer in layers.items():
        factor = layer.lora_A.weight  # (r, in), on the layer's device
        sums[path] = torch.zeros(factor.shape[1] + 1, device=factor.device)
    handles = [modules[path].register_forward_pre_hook(_watch(total)) for path, total in sums.items()]
    try:
        with without_gradients(model, trainer.dtype):
            for example in rows:
                batch = trainer.task.collator.collate_training([example], trainer.tokenizer)
                prepared = moved(trainer.task.objective.prepare(batch, model), trainer.device)
                trainer.task.objective.forward(model, prepared)
                _check_stop(trainer)
    finally:
        for handle in handles:
            handle.remove()
    processes.barrier()  # rows of one process may take longer than those of another
    totals = {path: processes.sum(total) for path, total in sums.items()}
    return {path: total[:-1] / total[-1] for path, total in totals.items() if total[-1] > 0}


def _check_stop(trainer: Trainer) -> None:
    """Raise StopEvaluation if a single process is to stop; several have to stay together."""
    if trainer.distributed.world_size == 1 and trainer.stop.is_requested():
        raise StopEvaluation


def _watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that adds the squared entries of a layer's inputs, and their number, to ``total`` (in + 1,)."""

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach().flatten(0, -2).float()  # (T, in)
        total[:-1] += (x**2).sum(dim=0)
        total[-1] += len(x)

    return hook
