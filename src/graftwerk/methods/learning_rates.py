"""Default learning rates by task and method, where the method's own default does not suit the task.

A method's own default (`Method.default_learning_rate`) was chosen for a text that gets one of a few classes, and holds
for every task that is not in the table. How the rates were chosen: docs/decisions/0006-default-learning-rates.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from graftwerk.methods.base import Method

LEARNING_RATES: Mapping[str, Mapping[str, float]] = {
    "multilabel": {"full": 2e-4, "lora": 2e-3},
    "token-classification": {"full": 2e-4, "lora": 2e-3},
}
"""By task and method: the peak rate of the method, and of a task head, which has no other rate."""


def default_learning_rates(method: Method, task: str | None) -> tuple[float, float | None]:
    """Return the default rates of a method and of a task head, None for a head that takes the method's rate.

    Args:
        method: The method.
        task: Name of the task, or None for the method's own rates.

    Example:
        >>> from graftwerk.methods.lora import LoRA
        >>> default_learning_rates(LoRA(), "classification")
        (0.001, None)
    """
    rates = LEARNING_RATES.get(task or "", {})
    return rates.get(method.name, method.default_learning_rate), method.default_head_learning_rate
