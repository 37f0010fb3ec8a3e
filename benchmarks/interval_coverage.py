"""How often the joint intervals of a comparison miss the truth, how often they find a gap, and how wide they are.

Comparisons are simulated: 500 rows whose difficulty all methods share, a taste of each method's own, a shift of all
rows for each seed, and noise in every answer. The spread is what seeds do to the accuracy (standard deviation, in
points). The intervals are the package's own, of `joint_bootstrap(...).simultaneous(0.95)`.

    python -m benchmarks.interval_coverage                         # the 36 cells, 1,000 simulations each: an hour
    python -m benchmarks.interval_coverage --cells 7x3 --gap 5     # power for a gap of 5 points
    python -m benchmarks.interval_coverage --unequal               # every other method without a seed effect
    python -m benchmarks.interval_coverage --single                # intervals of one run: accuracy and F1 near 1
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from graftwerk.evaluation.metrics import metrics_of
from graftwerk.evaluation.paired_bootstrap import joint_bootstrap
from graftwerk.tasks.predictions import ClassPredictions

METHODS, SEEDS, SPREADS = (2, 4, 7), (2, 3, 5), (0.0, 1.0, 2.3, 4.3)
DIFFICULTY, TASTE, NOISE = 2.0, 0.7, 0.5
"""Standard deviations on the latent scale, on which an answer is right above zero."""


@dataclass(frozen=True)
class Cell:
    """One kind of comparison.

    Attributes:
        spread: Standard deviation between the seeds of a method, in points of accuracy.
        gap: How much better the first method is than all others, in points.
        accuracy: Of the others.
        unequal: Every other method has no seed effect.
    """

    methods: int
    seeds: int
    spread: float = 0.0
    gap: float = 0.0
    rows: int = 500
    accuracy: float = 0.752
    unequal: bool = False


@dataclass(frozen=True)
class Found:
    """Shares of the simulations (0 to 1), and the median half-width in points."""

    miss: float
    power: float
    half_width: float


def simulate(cell: Cell, rng: np.random.Generator) -> dict[str, dict[int, ClassPredictions]]:
    """Draw the predictions of one comparison, by method and seed."""
    normal = NormalDist()
    width = math.sqrt(DIFFICULTY**2 + TASTE**2 + NOISE**2)
    shift = cell.spread / 100 * width / normal.pdf(normal.inv_cdf(cell.accuracy))
    targets, difficulty = rng.integers(0, 2, cell.rows), rng.normal(0, DIFFICULTY, cell.rows)
    made = dict[str, dict[int, ClassPredictions]]()
    for m in range(cell.methods):
        own = 0.0 if cell.unequal and m % 2 else shift
        level = normal.inv_cdf(cell.accuracy + (cell.gap / 100 if m == 0 else 0.0)) * math.hypot(width, own)
        row_part = level + difficulty + rng.normal(0, TASTE, cell.rows)
        made[f"m{m}"] = {}
        for seed in range(cell.seeds):
            right = row_part + rng.normal(0, own) + rng.normal(0, NOISE, cell.rows) > 0
            made[f"m{m}"][seed] = ClassPredictions(None, np.eye(2)[np.where(right, targets, 1 - targets)], targets)
    return made


def coverage(cell: Cell, simulations: int, *, resamples: int = 1000, seed: int = 0, metric: str = "accuracy") -> Found:
    """Simulate comparisons and count those in which any joint 95 % interval misses its true difference."""
    rng = np.random.default_rng(seed)
    missed, found, half_widths = 0, 0.0, list[float]()
    for number in range(simulations):
        joint = joint_bootstrap(simulate(cell, rng), metric, resamples=resamples, seed=number)
        differences = joint.simultaneous(0.95)
        true = [cell.gap / 100 if d["a"] == "m0" else 0.0 for d in differences]
        missed += any(not d["low"] <= t <= d["high"] for d, t in zip(differences, true, strict=True))
        found += float(np.mean([d["low"] > 0 for d in differences if d["a"] == "m0"]))
        half_widths.append(float(np.median([(d["high"] - d["low"]) / 2 for d in differences])))
    return Found(missed / simulations, found / simulations, 100 * float(np.median(half_widths)))


def single_coverage(
    metric: str, rows: int, shares: tuple[float, ...], error: float, simulations: int, *, seed: int = 0
) -> float:
    """Return how often the 95 % interval of one run's metric holds its value on infinitely many rows.

    Args:
        shares: Of the classes.
        error: Share of the rows of each class that are given another class, drawn at random.
    """
    rng = np.random.default_rng(seed)
    classes = len(shares)
    cells = np.full((classes, classes), error / (classes - 1))
    np.fill_diagonal(cells, 1 - error)
    cells *= np.array(shares)[:, None]
    hits, seen = np.diag(cells), cells.sum(axis=0) + cells.sum(axis=1)
    f1 = 2 * hits / seen
    true = {"accuracy": 1 - error, "f1_macro": float(f1.mean()), "f1_weighted": float(f1 @ np.array(shares))}[metric]
    held = 0
    for number in range(simulations):
        drawn = rng.choice(classes * classes, size=rows, p=cells.ravel())
        predictions = ClassPredictions(None, np.eye(classes)[drawn % classes], drawn // classes)
        figure = metrics_of(predictions, names=[metric], resamples=500, seed=number)[metric]
        assert figure["low"] is not None
        assert figure["high"] is not None
        held += figure["low"] - 1e-12 <= true <= figure["high"] + 1e-12
    return held / simulations


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--cells", help="METHODSxSEEDS,...; default: 2, 4 and 7 methods with 2, 3 and 5 seeds")
    parser.add_argument("--gap", type=float, default=0.0, help="points by which the first method is better")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--accuracy", type=float, default=0.752)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--single", action="store_true")
    options = parser.parse_args(arguments)
    if options.single:
        print("metric rows classes error | coverage, %")
        for metric in ("accuracy", "f1_macro", "f1_weighted"):
            for rows in (50, 200):
                for shares in ((0.5, 0.5), (0.8, 0.2), (0.9, 0.1), (0.6, 0.3, 0.1)):
                    held = [
                        single_coverage(metric, rows, shares, error, options.simulations)
                        for error in (0.005, 0.02, 0.05, 0.15)
                    ]
                    print(metric, rows, shares, "|", *(f"{100 * one:.0f}" for one in held), flush=True)
        return 0
    pairs = [(m, s) for m in METHODS for s in SEEDS]
    if options.cells:
        pairs = [(int(m), int(s)) for m, _, s in (word.partition("x") for word in options.cells.split(","))]
    plain = Cell(2, 2, gap=options.gap, rows=options.rows, accuracy=options.accuracy, unequal=options.unequal)
    print("methods seeds spread gap | miss, %  power of one pair, %  half-width, points")
    for methods, seeds in pairs:
        for spread in SPREADS:
            cell = replace(plain, methods=methods, seeds=seeds, spread=spread)
            found = coverage(cell, options.simulations, resamples=options.resamples, metric=options.metric)
            print(
                f"{methods} {seeds} {spread} {options.gap:g} | {100 * found.miss:.1f}  {100 * found.power:.1f}  "
                f"{found.half_width:.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
