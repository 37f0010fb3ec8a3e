"""Aggregation of finished runs to a comparison: means, intervals, differences, costs, a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from graftwerk.errors import IntegrityError
from graftwerk.evaluation.metrics import METRICS, point
from graftwerk.evaluation.paired_bootstrap import JointBootstrap, joint_bootstrap
from graftwerk.evaluation.results_io import load_evaluation
from graftwerk.experiments.method_specs import MethodSpec
from graftwerk.experiments.significance import COSTS, at_chance, in_words, pareto_front, recommend, verdict
from graftwerk.tasks.predictions import ClassPredictions, Predictions
from graftwerk.training.run_dir import ADAPTER, read_manifest

LEAST_RESAMPLES = 2000
"""Simultaneous intervals look further into the tails than single ones."""


@dataclass(frozen=True)
class RunResult:
    """One finished run: its manifest, what `evaluate` stored with it, and its answers row by row."""

    folder: Path
    manifest: dict[str, Any]
    evaluation: dict[str, Any]
    predictions: Predictions


def measured_run(folder: Path) -> RunResult | None:
    """Load a run's results, or return None if the run is not finished and evaluated yet.

    Raises:
        IntegrityError: Its files are damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("status") != "finished" or not (folder / ADAPTER).is_dir():
        return None
    found = load_evaluation(folder, folder / ADAPTER)
    return None if found is None else RunResult(folder, manifest, *found)


def aggregate(
    entries: Sequence[MethodSpec],
    runs: Mapping[str, Mapping[int, RunResult]],
    failed: Mapping[str, Mapping[int, str]],
    *,
    metric: str,
    confidence: float,
    resamples: int,
    prefer: str,
    margin: float | None,
) -> dict[str, Any]:
    """Aggregate runs to the part of `comparison.json` that depends on measurements.

    Args:
        entries: The methods, in the order in which they are shown.
        runs: Results by name of the method and seed. A method may have none, if all its runs failed.
        failed: Why runs failed, likewise.
        metric: Name of the metric that decides.
        confidence: Level of the intervals, 0 to 1.
        resamples: Number of bootstrap resamples, raised to `LEAST_RESAMPLES`.
        prefer: The cost that the recommendation minimises, one of `significance.COSTS`.
        margin: Largest distance from the best mean, in the metric's own unit, at which a method may be recommended, or
            None for the rule of `significance.recommend`.

    Raises:
        IntegrityError: The runs do not share base, data or rows.
        DataError: The metric is undefined on the held-out rows.
    """
    names = [entry.name for entry in entries if runs.get(entry.name)]
    everything = [run for name in names for run in runs[name].values()]
    if not everything:
        return {"methods": [_unmeasured(entry, failed) for entry in entries], "differences": [], "front": {}}
    _check_alike(everything)
    resamples = max(resamples, LEAST_RESAMPLES)
    answers = {name: {seed: run.predictions for seed, run in runs[name].items()} for name in names}
    joints = _joints(answers, metric, resamples, everything[0].evaluation["metrics"])
    main = joints[metric]
    differences = main.simultaneous(confidence)
    methods = [
        _method(entry, runs[entry.name], failed.get(entry.name, {}), joints, metric, confidence)
        if entry.name in names
        else _unmeasured(entry, failed)
        for entry in entries
    ]
    shown = [method for method in methods if method.get("figure")]
    majority = _most_frequent(everything[0], metric)
    nothing = None if majority is None else at_chance(shown, majority["value"], majority["share"], metric)
    half_widths = [(difference["high"] - difference["low"]) / 2 for difference in differences]
    return {
        "rows": everything[0].evaluation["rows"],
        "split": everything[0].evaluation["split"],
        "labels": everything[0].evaluation["labels"],
        "base_fingerprint": everything[0].manifest["base_fingerprint"],
        "methods": methods,
        "differences": [
            {**difference, "verdict": verdict(difference, metric), "text": in_words(difference, metric)}
            for difference in differences
        ],
        "front": {
            cost: pareto_front(
                {method["name"]: method["figure"]["value"] for method in shown},
                {method["name"]: method["cost"][cost] for method in shown if method["cost"].get(cost) is not None},
                metric,
            )
            for cost in COSTS
        },
        "resolution": median(half_widths) if half_widths else None,
        "seed_spread": float(np.sqrt(main.parts.between)) if main.over_seeds else None,
        "majority": majority,
        "at_chance": nothing,
        "recommendation": None
        if nothing
        else recommend(shown, differences, prefer=prefer, margin=margin, metric=metric),
    }


def _most_frequent(run: RunResult, metric: str) -> dict[str, float | None] | None:
    """Return the majority baseline: the most frequent label's share of the rows, and the metric of always giving it.

    Returns:
        ``share`` and ``value``, or None if the rows have no labels.
    """
    predictions = run.predictions
    if not isinstance(predictions, ClassPredictions) or predictions.targets is None or not run.evaluation["labels"]:
        return None
    targets, scores = predictions.targets, predictions.scores
    counts = np.bincount(targets, minlength=scores.shape[1])
    always = np.zeros(scores.shape)
    always[:, counts.argmax()] = 1.0
    return {
        "share": float(counts.max() / len(targets)),
        "value": point(metric, ClassPredictions(None, always, targets)),
    }


def _check_alike(runs: Sequence[RunResult]) -> None:
    """Raise IntegrityError if runs differ in base, rows, held-out split or labels: they could not be compared."""
    for what, values in (
        ("base model", {str(run.manifest["base_fingerprint"]) for run in runs}),
        ("rows", {str(run.manifest["data"]["fingerprint"]) for run in runs}),
        ("held-out split", {str(run.evaluation["split"]) for run in runs}),
        ("labels", {str(run.evaluation["labels"]) for run in runs}),
    ):
        if len(values) > 1:
            raise IntegrityError(
                f"the runs of this comparison do not share their {what}: {', '.join(sorted(values))}",
                where=", ".join(str(run.folder) for run in runs[:4]),
                hint="compare again in an empty output_dir",
            )


def _joints(
    answers: Mapping[str, Mapping[int, Predictions]], metric: str, resamples: int, measured: Mapping[str, Any]
) -> dict[str, JointBootstrap]:
    """Return a joint bootstrap of every metric that is measured and defined; the deciding metric comes first."""
    first = next(iter(next(iter(answers.values())).values()))
    joints = {metric: joint_bootstrap(answers, metric, resamples=resamples)}
    for name in METRICS:
        if name != metric and name in measured and point(name, first) is not None:
            joints[name] = joint_bootstrap(answers, name, resamples=resamples)
    return joints


def _method(
    entry: MethodSpec,
    runs: Mapping[int, RunResult],
    failed: Mapping[int, str],
    joints: Mapping[str, JointBootstrap],
    metric: str,
    confidence: float,
) -> dict[str, Any]:
    first = next(iter(runs.values()))
    values = list(joints[metric].values[entry.name].values())
    return {
        **_said_of(entry),
        "figure": joints[metric].figure(entry.name, confidence),
        "seed_spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "metrics": {name: joint.figure(entry.name, confidence) for name, joint in joints.items()},
        "parameters": first.manifest["parameters"],
        "cost": {name: _middle([_costs(run)[name] for run in runs.values()]) for name in COSTS},
        "runs": {
            str(seed): {
                "folder": run.folder.name,
                "value": joints[metric].values[entry.name][seed],
                **_costs(run),
                "best": run.manifest.get("best"),
            }
            for seed, run in sorted(runs.items())
        },
        "failed": {str(seed): why for seed, why in sorted(failed.items())},
    }


def _unmeasured(entry: MethodSpec, failed: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    why = {str(seed): text for seed, text in sorted(failed.get(entry.name, {}).items())}
    return {**_said_of(entry), "figure": None, "cost": {}, "runs": {}, "failed": why}


def _said_of(entry: MethodSpec) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.method.title,
        "settings": entry.method.to_dict(),
        "mergeable": entry.method.mergeable,
        **({"changes": dict(entry.changes)} if entry.changes else {}),
    }


def _costs(run: RunResult) -> dict[str, float | None]:
    manifest, evaluation = run.manifest["cost"], run.evaluation["cost"]
    return {
        "trained_parameters": run.manifest["parameters"]["trained"],
        "adapter_bytes": evaluation["adapter_bytes"],
        "training_seconds": manifest.get("training_seconds"),
        "peak_memory_bytes": manifest.get("peak_memory_bytes"),
        "latency_ms_batch_1": evaluation.get("latency_ms_batch_1"),
        "latency_ms_batch_32": evaluation.get("latency_ms_batch_32"),
    }


def _middle(values: Sequence[float | None]) -> float | None:
    """Return the median over seeds, which one run on a busy machine does not move."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
