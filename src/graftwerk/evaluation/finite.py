"""Scores that are not finite, and whose fault that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graftwerk.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


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
        if (trained or not weight.requires_grad)
        and weight.is_floating_point()
        and not bool(torch.isfinite(weight).all())
    ]
    if names:
        raise ModelError(
            f"{len(names):,} weights of the base model hold NaN or infinity, `{names[0]}` among them",
            where=str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model"),
            hint="fetch the base again, or use another one: with these weights no training and no setting can help",
        )
