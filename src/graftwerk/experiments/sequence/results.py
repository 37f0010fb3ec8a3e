"""The matrix of a sequence and its measures, with intervals over rows and seeds.

Legend: T tasks; a[j][i] is the metric of task i after task j was learnt (j >= i).

* mean: of a[T-1][i] over all tasks. Lopez-Paz & Ranzato 2017, arXiv:1706.08840.
* learning: mean of a[i][i], of each task when it was learnt.
* backward transfer: mean of a[T-1][i] - a[i][i] over the tasks before the last. The same source.
* forgetting: mean of max_j a[j][i] - a[T-1][i] over these, j before the last. Chaudhry et al. 2018, arXiv:1801.10112.

All are counted in points, larger is better but for forgetting: a share times 100, BLEU and chrF as they are; where the
metric has no points (perplexity), percent of a[i][i], and there is no mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwerk.errors import DataError
from graftwerk.evaluation.bootstrap import Floats
from graftwerk.evaluation.metrics import METRICS, point
from graftwerk.evaluation.paired_bootstrap import Difference, JointBootstrap, joint_bootstrap
from graftwerk.evaluation.row_interval import MetricValue
from graftwerk.tasks.predictions import Predictions

Cells = Mapping[tuple[str, int, int, int], Predictions]
"""Predictions by variant, seed, j and i: of the rows of task i after task j was learnt."""
UNBOUNDED = (-np.inf, np.inf)
UNDEFINED = "the metric is undefined on these predictions (they are all alike, or a class is absent)"


@dataclass(frozen=True)
class Measure:
    """One measure of all variants.

    Attributes:
        values: Mean over seeds with its interval, by variant.
        seeds: Value of each seed, by variant.
        differences: Differences of all pairs of variants, whose intervals hold together.
    """

    values: dict[str, MetricValue]
    seeds: dict[str, dict[int, float]]
    differences: list[Difference]

    def to_dict(self, variant: str) -> dict[str, Any]:
        """Return the value of a variant as JSON has it."""
        return {**self.values[variant], "seeds": {str(seed): value for seed, value in self.seeds[variant].items()}}


class Matrix:
    """All cells of a sequence.

    Args:
        cells: The predictions.
        metrics: Metric of each task, in order.
        runs: Seeds of each variant whose tasks are all learnt.
        confidence: Level of the intervals.
        resamples: Draws of rows.

    Attributes:
        undefined: Why a cell has no value, by variant, j and i.
    """

    def __init__(
        self,
        cells: Cells,
        metrics: Sequence[str],
        runs: Mapping[str, Sequence[int]],
        *,
        confidence: float,
        resamples: int,
    ) -> None:
        self.metrics, self.runs, self.confidence = metrics, runs, confidence
        self.undefined: dict[tuple[str, int], str] = {}
        self._joints = [self._joint(cells, task, resamples) for task in range(len(metrics))]

    def _joint(self, cells: Cells, task: int, resamples: int) -> JointBootstrap | None:
        """Draw the rows of a task together for all cells of its column in which its metric is defined."""
        column = {
            f"{variant}/{after}": {seed: cells[variant, seed, after, task] for seed in seeds}
            for variant, seeds in self.runs.items()
            for after in range(task, len(self.metrics))
        }
        for name, runs in column.items():
            lacking = [str(seed) for seed, found in runs.items() if point(self.metrics[task], found) is None]
            if lacking:
                self.undefined[name, task] = f"{UNDEFINED}: seed {', '.join(lacking)}"
        column = {name: runs for name, runs in column.items() if (name, task) not in self.undefined}
        return joint_bootstrap(column, self.metrics[task], resamples=resamples, seed=task) if column else None

    def rows(self, variant: str) -> list[list[MetricValue | None]]:
        """Return the matrix of a variant: a[j][i] with its interval, None above the diagonal.

        A cell whose metric is undefined has no value, and the reason as its ``note``.
        """
        places = range(len(self.metrics))
        return [
            [self._figure(f"{variant}/{after}", task) if task <= after else None for task in places] for after in places
        ]

    def _figure(self, key: str, task: int) -> MetricValue:
        joint = self._joints[task]
        if joint is None or (key, task) in self.undefined:
            return {"value": None, "low": None, "high": None, "note": self.undefined[key, task]}
        try:
            return joint.figure(key, self.confidence)
        except DataError as error:  # too few draws for intervals over seeds
            value = float(joint.means[joint.methods.index(key)])
            return {"value": value, "low": None, "high": None, "note": error.what}

    def measures(self) -> dict[str, Measure]:
        """Return the measures by name; ``mean`` and ``learning`` only if all metrics have points."""
        names = ["backward_transfer", "forgetting"]
        if all(METRICS[metric].words == " points" for metric in self.metrics):
            names = ["mean", "learning", *names]
        return {name: found for name in names if (found := self._measure(name)) is not None}

    def _measure(self, name: str) -> Measure | None:
        """Return a measure of the variants whose cells all have values, or None if there is no such variant."""
        values: dict[str, dict[int, float]] = {}
        draws = []
        whole = {
            variant: seeds
            for variant, seeds in self.runs.items()
            if not any(key.rpartition("/")[0] == variant for key, _ in self.undefined)
        }
        if not whole:
            return None
        for variant, seeds in whole.items():
            for place, seed in enumerate(seeds):
                value, drawn = self._one(name, variant, place, seed)
                values.setdefault(variant, {})[seed] = value
                draws.append(drawn)
        joint = JointBootstrap(tuple(whole), values, np.stack(draws, axis=1), limits=UNBOUNDED)
        try:
            figures = {variant: joint.figure(variant, self.confidence) for variant in whole}
            return Measure(figures, values, joint.simultaneous(self.confidence))
        except DataError as error:  # most draws of the rows leave a metric undefined
            means = dict(zip(whole, joint.means.tolist(), strict=True))
            bare: dict[str, MetricValue] = {
                variant: {"value": mean, "low": None, "high": None, "note": error.what}
                for variant, mean in means.items()
            }
            return Measure(bare, values, [])

    def _one(self, name: str, variant: str, place: int, seed: int) -> tuple[float, Floats]:
        """Return a measure of one seed: its value, and that of each draw of rows (R,)."""
        last = len(self.metrics) - 1
        parts: list[tuple[float, Floats]] = []
        for task in range(last + 1 if name in ("mean", "learning") else last):
            cell = {after: self._cell(variant, place, seed, after, task) for after in range(task, last + 1)}
            if name == "mean":
                parts.append(cell[last])
            elif name == "learning":
                parts.append(cell[task])
            elif name == "backward_transfer":
                parts.append((cell[last][0] - cell[task][0], cell[last][1] - cell[task][1]))
            else:
                best = max(range(task, last), key=lambda after: cell[after][0])  # the same state for all draws
                parts.append((cell[best][0] - cell[last][0], cell[best][1] - cell[last][1]))
        return float(np.mean([value for value, _ in parts])), np.mean([drawn for _, drawn in parts], axis=0)

    def _cell(self, variant: str, place: int, seed: int, after: int, task: int) -> tuple[float, Floats]:
        """Return a[after][task] of one seed in points, larger being better, with its draws (R,)."""
        joint, key = self._joints[task], f"{variant}/{after}"
        assert joint is not None
        first = sum(len(joint.values[name]) for name in joint.methods[: joint.methods.index(key)])
        value, drawn = joint.values[key][seed], joint.draws[:, first + place]
        metric = METRICS[self.metrics[task]]
        if metric.words == " points":
            return metric.scale * value, metric.scale * drawn
        sign = -1.0 if metric.higher is False else 1.0
        unit = 100 * sign / abs(joint.values[f"{variant}/{task}"][seed] or 1.0)
        return unit * value, unit * drawn
