"""Full fine-tuning: every weight is trained. The baseline that the small methods are measured against.

Source: Howard & Ruder 2018, arXiv:1801.06146, and every model card since.

Parameters: all of them.
Trade-off: the most that a model can learn from the data, for 16 bytes of memory a parameter in training, a copy of
the model for each task, and the most forgetting.
"""

from __future__ import annotations

from pydantic import Field

from graftwerk.methods.base import Method


class Full(Method):
    """Settings of full fine-tuning.

    Example:
        >>> Full(keep_base=False).kind
        'weights'
    """

    name = "full"
    title = "Full fine-tuning"
    paper = "Howard & Ruder 2018, arXiv:1801.06146"
    kind = "weights"
    identity_at_start = True
    supports_rows = False
    default_learning_rate = 5e-5

    keep_base: bool = Field(
        default=True,
        description="keep the base's weights in memory, so that the model can be disabled, switched and "
        "detached; false: train in place",
    )
