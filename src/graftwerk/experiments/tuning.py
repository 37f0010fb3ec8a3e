"""Settings of the training that a comparison tries for each method: chosen on validation rows.

`learning_rate=1e-3,3e-3` trains every method at both. Which of them stands for the method is settled by the mean of the
metric on the validation rows; only that one goes into the ranking, which is made on the test rows. To choose by test
rows and report the same rows would favour whoever tries more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from statistics import fmean
from typing import Any

from graftwerk.errors import ConfigError
from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.aggregation import TrialResult
from graftwerk.experiments.axes import several
from graftwerk.experiments.method_specs import NO_AXES, MethodSpec, slug
from graftwerk.experiments.table import format_metric
from graftwerk.settings_parsing import parse_settings, spellings
from graftwerk.training.settings import TrainingSettings

Axes = dict[str, tuple[Any, ...]]


def read_axes(overrides: Mapping[str, Any]) -> tuple[Axes, dict[str, Any]]:
    """Separate settings of the training with several values from the other overrides.

    Args:
        overrides: Settings by key, as for `RunConfig.build`: ``learning_rate="1e-3,3e-3"``, or a list of values.

    Returns:
        Values to try by field of `TrainingSettings`; the other overrides.

    Raises:
        ConfigError: A value is wrong, or there twice.
    """
    axes: Axes = {}
    others = {}
    for key, given in overrides.items():
        field = next(
            iter(spellings(TrainingSettings, key.removeprefix("training.")) & {*TrainingSettings.model_fields}), ""
        )
        read = several(given, key) if field and field not in NO_AXES else None
        if read is None:
            others[key] = given
            continue
        parsed = [
            getattr(parse_settings(TrainingSettings, {field: each}, what="a training", where="training"), field)
            for each in read
        ]
        if len({*parsed}) < len(parsed):
            raise ConfigError(f"`{key}` has a value twice", where=key, hint="give each value once")
        axes[field] = tuple(parsed)
    return axes, others


def require_validation(axes: Axes, rows: Mapping[str, int], budget: object = None) -> None:
    """Refuse to tune without validation rows.

    Raises:
        ConfigError: Something is to be tuned, and there are none.
    """
    if (axes or budget) and not rows.get("validation"):
        raise ConfigError(
            f"`{next(iter(axes), 'learning_rate')}` is tuned on validation rows, and there are none",
            where="data.validation",
            hint="data.validation=0.1; test rows are for the final comparison",
        )


def planned_runs(methods: Sequence[MethodSpec], axes: Axes, seeds: Sequence[int], budget: object = None) -> str:
    """Return how many runs a comparison makes, and of what: 2 methods, 3 seeds (seeds=0,1,2): 6 runs.

    Args:
        methods: The methods.
        axes: Values to try by setting of the training.
        seeds: The seeds.
        budget: What each method may spend on trials, in words if it is printed, or None if it tries all values.
    """
    parts = [f"{len(methods)} method{'s' if len(methods) > 1 else ''}"]
    if budget is not None:
        runs = len(methods) * len(seeds)
        said = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} (seeds={','.join(map(str, seeds))})"
        return f"{parts[0]}, {budget} for each to find its settings, then {said}: {runs:,} run{'s' if runs > 1 else ''}"
    parts += [f"{len(values)} values of {name}" for name, values in axes.items()]
    parts.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} (seeds={','.join(map(str, seeds))})")
    runs = prod(map(len, (methods, *axes.values(), seeds)))
    return f"{', '.join(parts)}: {runs:,} run{'s' if runs > 1 else ''}"


def tuned(specs: Sequence[MethodSpec], axes: Axes) -> list[MethodSpec]:
    """Cross methods with the values to try; each of the results knows for which method it is tried.

    Raises:
        ConfigError: A method has a value of its own for what is tried.
    """
    if not axes:
        return list(specs)
    for spec in specs:
        refuse_own_values(spec, axes)
    grid = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return [crossed(spec, tried) for spec in specs for tried in grid]


def refuse_own_values(spec: MethodSpec, axes: Axes) -> None:
    """Refuse a method that has a value of its own for what is tried.

    Raises:
        ConfigError: It has one.
    """
    if own := {f"training.{name}" for name in axes} & set(spec.changes):
        raise ConfigError(
            f"`{spec.name}` has `{own.pop()}` of its own, and several are to be tried",
            where="methods",
            hint="give it in one place",
        )


def method_of(spec: MethodSpec) -> str:
    """Return the name of the method that a spec stands for or is tried for."""
    return spec.tried_for or spec.name


def crossed(spec: MethodSpec, tried: Mapping[str, Any]) -> MethodSpec:
    """Return a trial of a method with values for settings of the training."""
    changes = {f"training.{name}": value for name, value in tried.items()}
    name = slug(spec.name, tried)
    return replace(spec, name=name, changes={**spec.changes, **changes}, tried_for=spec.name)


def chosen(
    specs: Sequence[MethodSpec],
    runs: Mapping[str, Mapping[int, TrialResult]],
    failed: Mapping[str, Mapping[int, str]],
    metric: str,
) -> tuple[list[MethodSpec], list[dict[str, Any]]]:
    """Choose by the validation rows what stands for each method.

    That is the best mean of the values whose runs all came to an end, or else of those with the most runs that did.

    Args:
        specs: What was trained.
        runs: Results by name and seed.
        failed: Why runs failed, likewise.
        metric: Name of the metric that decides.

    Returns:
        The specs that go into the ranking; and, for each method that was tuned, ``method``, ``metric``, ``rows``,
        ``chosen`` and what was ``tried``: ``name``, ``changes``, ``value`` (the mean over seeds) and ``failed``.
    """
    ranked, told = [], []
    for method in dict.fromkeys(map(method_of, specs)):
        group = [spec for spec in specs if method_of(spec) == method]
        if not group[0].tried_for:
            ranked.append(group[0])
            continue
        tried = [_tried(spec, runs.get(spec.name, {}), failed.get(spec.name, {}), metric) for spec in group]
        best = max(tried, key=lambda one: (one["runs"], METRICS[metric].better(one["value"] or 0.0, 0.0)))
        ranked.append(group[tried.index(best)])
        told.append({"method": method, "metric": metric, "rows": "validation", "chosen": best["name"], "tried": tried})
    return ranked, told


def _tried(spec: MethodSpec, runs: Mapping[int, TrialResult], failed: Mapping[int, str], metric: str) -> dict[str, Any]:
    values = [run.manifest["metrics"]["validation"][metric]["value"] for run in runs.values()]
    known = [value for value in values if value is not None]
    why = {str(seed): text for seed, text in sorted(failed.items())}
    value = fmean(known) if known else None
    return {"name": spec.name, "changes": dict(spec.changes), "runs": len(known), "value": value, "failed": why}


def describe_tuning(tuning: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note for each method that was tuned: what was tried, with its validation score, and what was chosen."""
    said = []
    for each in tuning:
        metric, best = each["metric"], each["chosen"]
        scores = ", ".join(
            f"{_words(one['changes'])}: {format_metric(one['value'], metric)}"
            + (f" ({len(one['failed'])} failed)" if one["failed"] else "")
            for one in each["tried"]
        )
        settings = next(_words(one["changes"]) for one in each["tried"] if one["name"] == best)
        said.append(
            f"{each['method']} is ranked with {settings}, chosen by {METRICS[metric].title} on the validation rows "
            f"({scores})" + ("; the others are not ranked" if len(each["tried"]) > 1 else "")
        )
    return said


def _words(changes: Mapping[str, Any]) -> str:
    own = [(key.partition(".")[2], value) for key, value in changes.items() if key.startswith(("training.", "method."))]
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in own)
