"""Quality against cost: what a method costs, and which methods no other one dominates."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from graftwerk.evaluation.metrics import METRICS

COSTS: dict[str, str] = {
    "trained_parameters": "trained parameters",
    "adapter_bytes": "adapter size",
    "training_seconds": "training time",
    "peak_memory_bytes": "peak memory",
    "latency_ms_batch_1": "latency, one row",
    "latency_ms_batch_32": "latency, 32 rows",
}
"""Costs of a method, with their titles; smaller is better for all."""

FRONT = ("peak_memory_bytes", "training_seconds", "adapter_bytes")
"""Costs of the front in several costs at once: memory, time, size."""


def pareto_front(quality: Mapping[str, float], cost: Mapping[str, float], metric: str = "accuracy") -> list[str]:
    """Return the Pareto front of quality and cost by point values, cheapest first.

    A method is dominated by another that is at least as good and as cheap, and better in one of the two.
    """
    front = pareto_set(quality, [cost], metric)
    return sorted(front, key=lambda name: cost[name])


def pareto_set(
    quality: Mapping[str, float], costs: Sequence[Mapping[str, float]], metric: str = "accuracy"
) -> list[str]:
    """Return the Pareto front of quality and several costs by point values: what no other method beats in all of them.

    Args:
        quality: Value of the metric by method.
        costs: Each cost by method; methods without one of them are left out.
        metric: Name of the metric.
    """
    known = [name for name in quality if all(name in cost for cost in costs)]
    sign = 1 if METRICS[metric].higher is False else -1
    losses = {name: (sign * quality[name], *(cost[name] for cost in costs)) for name in known}

    def is_dominated(name: str) -> bool:
        own = losses[name]
        return any(other != own and all(map(operator.le, other, own)) for other in losses.values())

    return [name for name in known if not is_dominated(name)]
