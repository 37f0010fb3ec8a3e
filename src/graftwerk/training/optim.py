"""Optimizer: AdamW over an adapter's parameters in groups of one learning rate each; the schedule as a function.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101. The decay acts on matrices
only: vectors, biases, norms and scales are not pulled towards zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.errors import IntegrityError
from graftwerk.methods.learning_rates import default_learning_rates
from graftwerk.training.settings import TrainingSettings

if TYPE_CHECKING:
    from graftwerk.modeling.attach import Adapter
    from graftwerk.tasks.base import Task

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates.

    Attributes:
        method: Rate of the method's parameters.
        head: Rate of the task head.
        auto: True if the method's default was taken.
    """

    method: float
    head: float
    auto: bool


def peak_rates(adapter: Adapter, settings: TrainingSettings, task: Task | None = None) -> Rates:
    """Resolve `auto`: the default of method and task, and for heads their default for heads or else the method's rate.

    Args:
        adapter: Adapter to train.
        settings: Training settings.
        task: Task that is trained, or None if the method alone decides.
    """
    own, of_head = default_learning_rates(adapter.method, None if task is None else task.name)
    rate = own if settings.learning_rate == "auto" else settings.learning_rate
    head = settings.head_learning_rate if settings.head_learning_rate != "auto" else of_head or rate
    return Rates(rate, head, settings.learning_rate == "auto")


def parameter_groups(adapter: Adapter, settings: TrainingSettings, task: Task | None = None) -> list[dict[str, Any]]:
    """Return groups of equal rate and decay, in the order in which the adapter names its parameters.

    Returns:
        Groups for an optimizer. Each has ``keys`` (raw names) beside ``params``, and ``initial_lr``, the peak that the
        schedule multiplies.
    """
    rates = peak_rates(adapter, settings, task)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for key, parameter in adapter.named_parameters():
        head = adapter.is_head(key)
        rate = rates.head if head else rates.method * adapter.learning_rate_factor(key)
        decay = settings.weight_decay if parameter.ndim > 1 and min(parameter.shape) > 1 else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "keys": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["keys"].append(key)
    return list(groups.values())


def build_optimizer(adapter: Adapter, settings: TrainingSettings, task: Task | None = None) -> torch.optim.AdamW:
    """Return AdamW with its moments allocated, so that no step runs out of memory half way through an update."""
    groups = parameter_groups(adapter, settings, task)
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters)
    optimizer = torch.optim.AdamW(
        groups, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon, fused=fused
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def step_if(optimizer: torch.optim.AdamW, finite: Tensor) -> None:
    """Update the parameters if the gradient is finite, and else change nothing.

    Fused kernels read the flag on the device, so that the host does not wait for it.

    Args:
        optimizer: Optimizer that `build_optimizer` made.
        finite: Scalar, bool.
    """
    if not all(group["fused"] for group in optimizer.param_groups):
        if bool(finite):
            optimizer.step()
        return
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by name.

    Returns:
        ``exp_avg.<raw key>`` and ``exp_avg_sq.<raw key>`` (...), shaped as the parameter, and ``step.<raw key>``, a
        scalar.
    """
    return {
        f"{part}.{key}": optimizer.state[parameter][part].detach()
        for group in optimizer.param_groups
        for key, parameter in zip(group["keys"], group["params"], strict=True)
        for part in MOMENTS
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors that `optimizer_tensors` returned into an optimizer.

    Args:
        optimizer: Optimizer of the same adapter.
        tensors: Its state by name, any shape.

    Raises:
        IntegrityError: A tensor is missing, left over, or of another shape.
    """
    expected = optimizer_tensors(optimizer)
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise IntegrityError(
            f"the optimizer's state does not fit this adapter: {len(wrong)} names differ, the first is {wrong[0]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise IntegrityError(
                f"optimizer state {name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """Return the factor on the peak rate of a step.

    The rate rises linearly over the first ``warmup`` steps (the first already learns), then stays (`constant`), or
    falls towards zero along a line (`linear`) or half a cosine (`cosine`), which it would reach one step after the
    last.

    Args:
        kind: `constant`, `linear` or `cosine`.
        step: Number of the step, from 0.
        total: Steps of the run.
        warmup: Steps in which the rate rises.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
