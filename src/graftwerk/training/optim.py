"""The optimizer: AdamW over a graft's parameters in groups of one learning rate each, and the schedule as a pure
function.

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
from graftwerk.training.settings import TrainingSettings

if TYPE_CHECKING:
    from graftwerk.modeling.attach import Adapter

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, and whether they are the method's own."""

    method: float
    head: float
    auto: bool


def peak_rates(graft: Adapter, settings: TrainingSettings) -> Rates:
    """`auto` resolved: a method's rate is its class default; a head's the method's default for heads, else the
    method's rate.
    """
    own = graft.method.default_learning_rate
    rate = own if settings.learning_rate == "auto" else settings.learning_rate
    if settings.head_learning_rate != "auto":
        head = settings.head_learning_rate
    else:
        head = graft.method.default_head_learning_rate or rate
    return Rates(rate, head, settings.learning_rate == "auto")


def parameter_groups(graft: Adapter, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups of equal rate and decay, in the order in which the graft names its parameters.

    Each group has ``keys`` (raw names) beside ``params``, and ``initial_lr``, the peak that the schedule multiplies.
    """
    rates = peak_rates(graft, settings)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for key, parameter in graft.named_parameters():
        head = graft.is_head(key)
        rate = rates.head if head else rates.method * graft.learning_rate_factor(key)
        decay = settings.weight_decay if parameter.ndim > 1 and min(parameter.shape) > 1 else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "keys": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["keys"].append(key)
    return list(groups.values())


def build_optimizer(graft: Adapter, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW whose moments are already there, so that a step can no longer run out of memory half way through an
    update.
    """
    groups = parameter_groups(graft, settings)
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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments by name: ``exp_avg.<raw key>`` and ``exp_avg_sq.<raw key>`` shaped as the parameter, ``step.<raw
    key>`` ().
    """
    return {
        f"{moment}.{key}": optimizer.state[parameter][moment].detach()
        for group in optimizer.param_groups
        for key, parameter in zip(group["keys"], group["params"], strict=True)
        for moment in MOMENTS
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, copied in place.

    Raises:
        IntegrityError: a moment is missing, left over, or of another shape.
    """
    expected = optimizer_tensors(optimizer)
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise IntegrityError(
            f"the optimizer's state and this adapter do not fit: {len(wrong)} names differ, the first is {wrong[0]}"
        )
    for name, moment in expected.items():
        if moment.shape != tensors[name].shape:
            raise IntegrityError(
                f"optimizer state {name} has shape {tuple(tensors[name].shape)}, expected {tuple(moment.shape)}"
            )
        moment.copy_(tensors[name])


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """Factor on the peak rate of step ``step`` (counted from 0) of ``total``.

    The rate rises linearly over the first ``warmup`` steps (the first already learns), then stays (`constant`), or
    falls towards zero along a line (`linear`) or half a cosine (`cosine`), which it would reach one step after the
    last.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
