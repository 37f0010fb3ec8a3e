"""Evidence for a recommendation: the comparisons and searches under a folder that are of the same task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, GraftwerkError
from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.recommendation.rules import CANDIDATES, settings_of
from graftwerk.experiments.result_folder import SCALE
from graftwerk.experiments.significance import describe_difference, find_difference, verdict
from graftwerk.methods.registry import parse_method
from graftwerk.reporting.files import COMPARISON, SEARCH, at, mapping, mappings, number, words
from graftwerk.serialization.untrusted_files import read_sealed

DEPTH = 3
"""Folders below the given one that are looked into."""
SAME_ROWS, SAME_MODEL, SAME_TASK = 4.0, 2.0, 1.0
"""Points of a measurement on the same rows and model, on the same model, or on the same task alone."""


@dataclass
class Evidence:
    """Measurements that were found.

    Attributes:
        points: By label of the candidate: points, and the reason.
        settings: By label of the candidate: the best settings of a search on the same model and task, and its folder.
        notes: Files that could not be used, and why.
        files: How many could.
    """

    points: dict[str, list[tuple[float, str, str]]] = field(default_factory=dict)
    settings: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: int = 0


def find_evidence(folder: Path, model: str, task: str, fingerprint: str, depth: int) -> Evidence:
    """Read the finished comparisons and searches under a folder that are of this task."""
    found = Evidence()
    labels = {str(_kind(settings_of(label, depth))): label for label in CANDIDATES}
    for depth in range(DEPTH + 1):
        for name in (COMPARISON, SEARCH):
            for path in sorted(folder.glob("*/" * depth + name)):
                try:
                    result = read_sealed(path, scale=SCALE)
                except GraftwerkError as error:
                    found.notes.append(f"{path} is not used: {error.what}")
                    continue
                if words(result, "status") != "finished" or words(result, "task") != task:
                    continue
                same = words(result, "model") == model
                rows = same and words(result, "data", "fingerprint") == fingerprint
                weight = SAME_ROWS if rows else SAME_MODEL if same else SAME_TASK
                where = "these rows" if rows else "other rows, the same model" if same else words(result, "model")
                found.files += 1
                if name == COMPARISON:
                    _compared(found, labels, result, path.parent, weight, where)
                elif same:
                    _searched(found, labels, result, path.parent)
    return found


def _kind(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what makes a method another one than those of its name: all but sizes, rates and where it is put."""
    try:
        values = parse_method(dict(settings)).to_dict()
    except ConfigError:  # of another version
        return None
    return {
        key: value
        for key, value in values.items()
        if key != "target_modules" and (isinstance(value, bool) or not isinstance(value, int | float))
    }


def _compared(
    found: Evidence, labels: Mapping[str, str], result: Mapping[str, Any], folder: Path, weight: float, where: str
) -> None:
    """Add a comparison: who is not shown to be worse than the best gets points, who is shown loses some."""
    metric = words(result, "metric")
    if metric not in METRICS or at(result, "ablation"):
        return
    measured = {
        words(one, "name"): one for one in mappings(result, "methods") if number(one, "figure", "value") is not None
    }
    if len(measured) < 2:
        return
    better = METRICS[metric].better
    best = max(measured, key=lambda name: better(number(measured[name], "figure", "value") or 0.0, 0.0))
    source = f"{folder}: {where}, {number(result, 'rows') or 0:,.0f} {words(result, 'split')} rows"
    spoken = set[str]()  # a candidate that was compared with several settings speaks by its best
    for name, one in sorted(measured.items(), key=lambda pair: -better(number(pair[1], "figure", "value") or 0.0, 0.0)):
        label = labels.get(str(_kind(mapping(one, "settings"))))
        if label is None or label in spoken:
            continue
        spoken.add(label)
        if name == best:
            value = METRICS[metric].text(number(one, "figure", "value") or 0.0)
            _add(found, label, weight, f"the best mean there: {METRICS[metric].title} {value}", source)
            continue
        try:
            difference = find_difference(at(result, "differences") or [], name, best)
            said = verdict(difference, metric)
            text = describe_difference(difference, metric)
        except (KeyError, TypeError):
            continue
        points = -weight if said == "worse" else weight / 2
        _add(found, label, points, f"against {best}, the best mean there: {text}", source)


def _add(found: Evidence, label: str, points: float, why: str, source: str) -> None:
    found.points.setdefault(label, []).append((points, why, source))


def _searched(found: Evidence, labels: Mapping[str, str], result: Mapping[str, Any], folder: Path) -> None:
    best = dict(mapping(result, "best", "settings"))
    own = {key.partition(".")[2]: value for key, value in best.items() if key.startswith("method.")}
    label = labels.get(str(_kind({**mapping(result, "method"), **own})))
    if label is not None and words(result, "difference", "verdict") == "better":
        found.settings[label] = (best, str(folder))
