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
from graftwerk.evaluation.paired_bootstrap import Difference, JointBootstrap, joint_bootstrap
from graftwerk.evaluation.results_io import load_evaluation
from graftwerk.experiments.factors import Ablation
from graftwerk.experiments.method_specs import MethodSpec
from graftwerk.experiments.pareto import COSTS, FRONT, pareto_front, pareto_set
from graftwerk.experiments.recommended_method import at_chance, recommend
from graftwerk.experiments.significance import describe_difference, margin_of, verdict
from graftwerk.tasks.predictions import ClassPredictions, Predictions
from graftwerk.training.run_dir import ADAPTER, TRIAL, read_manifest

LEAST_RESAMPLES = 2000
"""Simultaneous intervals look further into the tails than single ones."""


@dataclass(frozen=True)
class TrialResult:
    """One trained run, perhaps measured on validation rows alone: its manifest."""

    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class RunResult(TrialResult):
    """One finished run: its manifest, what `evaluate` stored with it, and its answers row by row."""

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


def trained_trial(folder: Path) -> TrialResult | None:
    """Load the manifest of a trial, or return None if it is not trained and measured on validation rows yet."""
    manifest = read_manifest(folder)
    done = manifest is not None and manifest.get("status") in (TRIAL, "finished")
    return TrialResult(folder, manifest) if done and manifest else None


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
    ablation: Ablation | None = None,
) -> dict[str, Any]:
    """Aggregate runs to the part of `comparison.json` that depends on measurements.

    Args:
        entries: The methods, in the order in which they are shown.
        runs: Results by name of the method and seed. A method may have none, if all its runs failed.
        failed: Why runs failed, likewise.
        metric: Name of the metric that decides.
        confidence: Level of the intervals, 0 to 1.
        resamples: Number of bootstrap resamples, raised to `LEAST_RESAMPLES`.
        prefer: The cost that the recommendation minimises, one of `pareto.COSTS`.
        margin: Distance in the metric's own unit within which methods are practically equal, and from the best mean at
            which one may be recommended; or None for `significance.margin_of` and the rule of `recommend`.
        ablation: Axes whose effects are tested, or None.

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
    equal = margin_of(metric, _best(shown, metric)) if margin is None else margin
    detectable = main.pairs.detectable(confidence) if differences else np.zeros(0)
    half_widths = [(difference["high"] - difference["low"]) / 2 for difference in differences]
    return {
        "rows": everything[0].evaluation["rows"],
        "split": everything[0].evaluation["split"],
        "labels": everything[0].evaluation["labels"],
        "base_fingerprint": everything[0].manifest["base_fingerprint"],
        "methods": methods,
        "differences": [
            _with_verdict(difference, metric, equal, float(least))
            for difference, least in zip(differences, detectable, strict=True)
        ],
        "front": {
            cost: pareto_front(
                {method["name"]: method["figure"]["value"] for method in shown},
                {method["name"]: method["cost"][cost] for method in shown if method["cost"].get(cost) is not None},
                metric,
            )
            for cost in COSTS
        },
        "pareto": _pareto(shown, metric),
        "margin": equal,
        "resolution": median(half_widths) if half_widths else None,
        "detectable": float(np.median(detectable)) if differences else None,
        "seed_spread": float(np.sqrt(main.parts.between)) if main.over_seeds else None,
        "majority": majority,
        "at_chance": nothing,
        **({} if ablation is None else {"ablation": effects(ablation, main, metric, confidence, equal)}),
        "recommendation": None
        if nothing
        else recommend(shown, differences, prefer=prefer, margin=margin, metric=metric),
    }


def _with_verdict(difference: Difference, metric: str, margin: float, detectable: float | None) -> dict[str, Any]:
    """Return a difference as `comparison.json` has it: with the probability that a is better, and a verdict."""
    larger = difference.get("p_larger", 0.5)
    return {
        **{key: value for key, value in difference.items() if key != "p_larger"},
        "p_better": 1 - larger if METRICS[metric].higher is False else larger,
        **({} if detectable is None else {"detectable": detectable}),
        "verdict": verdict(difference, metric, margin),
        "text": describe_difference(difference, metric, margin),
    }


def _best(methods: Sequence[Mapping[str, Any]], metric: str) -> float:
    values = [method["figure"]["value"] for method in methods]
    best: float = max(values, key=lambda value: METRICS[metric].better(value, 0.0))
    return best


def _pareto(methods: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return the front in quality and in all costs of `pareto.FRONT` that were measured, at two digits."""
    costs = [cost for cost in FRONT if all(method["cost"].get(cost) is not None for method in methods)]
    rounded = [{method["name"]: float(f"{method['cost'][cost]:.2g}") for method in methods} for cost in costs]
    quality = {method["name"]: method["figure"]["value"] for method in methods}
    return {"costs": costs, "methods": pareto_set(quality, rounded, metric)}


def effects(
    ablation: Ablation, joint: JointBootstrap, metric: str, confidence: float, margin: float | None = None
) -> dict[str, Any]:
    """Return the effect of each axis: the mean of each value, and the differences between them.

    Args:
        ablation: The axes.
        joint: Bootstrap of the metric over all cells.
        metric: Its name.
        confidence: Level of the intervals, which hold together for the differences of an axis.
        margin: Within which values of an axis are practically equal, or None for the default of the metric.
    """
    equal = margin_of(metric, float(np.max(joint.means))) if margin is None else margin
    found: list[dict[str, Any]] = []
    for axis, groups in ablation.groups(joint.methods).items():
        if not all(groups.values()):  # runs failed, and no combination is left that has every value
            found.append({"axis": axis, "levels": [], "differences": []})
            continue
        figures, differences = joint.grouped(groups, confidence)
        found.append(
            {
                "axis": axis,
                "levels": [
                    {"value": level, "cells": groups[level], "figure": figure}
                    for level, figure in zip(groups, figures, strict=True)
                ],
                "differences": [_with_verdict(each, metric, equal, None) for each in differences],
            }
        )
    return {"design": ablation.design, "axes": {key: list(it) for key, it in ablation.axes.items()}, "effects": found}


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
    """Raise IntegrityError if runs differ in base, rows, held-out split or labels: they could not be compared.

    Where each seed draws its own training rows, the runs of a seed share theirs.
    """
    by_draw: dict[str, set[str]] = {}
    for run in runs:
        drawn = str((run.manifest["data"].get("origin") or {}).get("train_seed"))
        by_draw.setdefault(drawn, set()).add(str(run.manifest["data"]["fingerprint"]))
    for what, values in (
        ("base model", {str(run.manifest["base_fingerprint"]) for run in runs}),
        *(("rows", found) for found in by_draw.values()),
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
        **_described(entry),
        "figure": joints[metric].figure(entry.name, confidence),
        "seed_spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "metrics": {name: joint.figure(entry.name, confidence) for name, joint in joints.items()},
        "parameters": first.manifest["parameters"],
        "cost": {name: _middle([_costs(run)[name] for run in runs.values()]) for name in _costs(first)},
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
    return {**_described(entry), "figure": None, "cost": {}, "runs": {}, "failed": why}


def _described(entry: MethodSpec) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.method.title,
        "settings": entry.method.to_dict(),
        "mergeable": entry.method.mergeable,
        **({"changes": dict(entry.changes)} if entry.changes else {}),
    }


def _costs(run: RunResult) -> dict[str, float | None]:
    manifest, evaluation, retained = run.manifest["cost"], run.evaluation["cost"], run.manifest.get("retained")
    return {
        "trained_parameters": run.manifest["parameters"]["trained"],
        "adapter_bytes": evaluation["adapter_bytes"],
        "training_seconds": manifest.get("training_seconds"),
        "peak_memory_bytes": manifest.get("peak_memory_bytes"),
        "latency_ms_batch_1": evaluation.get("latency_ms_batch_1"),
        "latency_ms_batch_32": evaluation.get("latency_ms_batch_32"),
        **({} if retained is None else {"forgetting": (retained["forgetting"] or {}).get("value")}),
    }


def _middle(values: Sequence[float | None]) -> float | None:
    """Return the median over seeds, which one run on a busy machine does not move."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
