"""Forgetting, measured: what `evaluation.retained` names, answered before and after the training on the same rows.

Each entry is a set of rows with a task of its own: the held-out rows of an earlier run, a file of rows, or plain text,
of which the perplexity is measured. The head of an earlier run is lent to the model in place of the adapter's own
(`modeling.task_heads.lent_heads`): no second model is loaded.

Forgetting is counted in points: hundredths of a share, points of BLEU or chrF, percent of a perplexity or an error.
Its interval is that of the paired difference over rows (`evaluation.paired_bootstrap`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.errors import AdapterError, DataError, ForgettingError
from graftwerk.evaluation.forgetting import describe_losses
from graftwerk.evaluation.metrics import METRICS, metrics_of, point
from graftwerk.evaluation.paired_bootstrap import paired_difference
from graftwerk.evaluation.results_io import ROWS, save_predictions
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.task_heads import head_paths, lent_heads, stored_heads
from graftwerk.sanitize import redact
from graftwerk.serialization.folder import stored_tensors
from graftwerk.tasks.base import Predictions
from graftwerk.training.retained_rows import Retained
from graftwerk.training.validation import Evaluator

if TYPE_CHECKING:
    from torch import nn


class RetainedMeter:
    """Measure the entries on the model that a run trains.

    Args:
        entries: What `read_retained` read.
        adapter: The adapter, at its start.
        evaluator: The run's own evaluator, whose batch size, type and processes are used.
        settings: Settings of evaluation.
        base: Fingerprint of the run's base.

    Attributes:
        heads: Heads of the entries that have one of their own, by entry and path.
        notes: Remarks for the log.

    Raises:
        AdapterError: The head of an entry does not fit the model.
    """

    def __init__(
        self,
        entries: Sequence[Retained],
        adapter: Adapter,
        evaluator: Evaluator,
        settings: EvaluationSettings,
        base: str,
    ) -> None:
        self.entries, self.adapter, self.evaluator, self.settings = entries, adapter, evaluator, settings
        self.heads = {entry.name: heads_of(adapter, entry) for entry in entries}
        self.notes = [
            f"`{entry.name}` was trained on another base ({entry.base}) than this run's ({base}), and its head is used"
            for entry in entries
            if entry.base is not None and entry.base != base
        ]
        self.before: dict[str, Predictions] = {}
        self.seconds = 0.0

    def lent(self, entry: Retained) -> AbstractContextManager[None]:
        """Return a context in which the entry's own head answers."""
        heads = self.heads.get(entry.name)
        return lent_heads(self.adapter.model, self.adapter.name, heads) if heads else nullcontext()

    def measure(self, entry: Retained, *, generate: bool = True) -> Predictions:
        """Return the predictions of the model as it is now.

        Args:
            entry: The entry.
            generate: Let the model write answers, if the task has any.

        Raises:
            StopEvaluation: A stop signal came.
            DivergedError: The scores are not finite.
        """
        evaluate = copy(self.evaluator)
        evaluate.task, evaluate.serve = entry.task, None
        settings = entry.evaluation or self.settings  # an earlier run's answers are written as they were there
        settings = settings.model_copy(update={"generation_batch_size": self.settings.generation_batch_size})
        writes = generate and entry.task.generates and self.settings.generate and settings.generate
        with self.lent(entry):
            return evaluate(entry.examples, settings if writes else None)

    def start(self) -> None:
        """Measure all entries before the first step.

        Raises:
            StopEvaluation, DivergedError: As `measure`.
        """
        began = time.perf_counter()
        self.before = {entry.name: self.measure(entry) for entry in self.entries}
        self.seconds += time.perf_counter() - began

    def finish(self, run: Path, *, write: bool) -> dict[str, Any]:
        """Measure all entries again, store their predictions, and return what the manifest says of them.

        Args:
            run: The run folder.
            write: True for the process that writes files.

        Raises:
            StopEvaluation, DivergedError: As `measure`.
            ResourceError: The predictions cannot be written.
        """
        began = time.perf_counter()
        found: dict[str, Any] = {}
        for number, entry in enumerate(self.entries, start=1):
            after = self.measure(entry)
            found[entry.name] = compared(entry, self.before[entry.name], after, self.settings)
            if write:
                name = f"retained-{number}"
                found[entry.name]["stored"] = {"name": name, **save_predictions(run / ROWS, after, name)}
        self.seconds += time.perf_counter() - began
        return summary(found, self.settings.max_forgetting, self.seconds)


def heads_of(adapter: Adapter, entry: Retained) -> dict[str, nn.Module]:
    """Return the frozen heads of an entry's own adapter by path, empty if its task has none.

    Raises:
        AdapterError: They do not fit the model.
    """
    if entry.folder is None:
        return {}
    model = adapter.model
    found, architecture = stored_tensors(model, entry.folder), read_architecture(model)
    own = adapter.heads if adapter.weights is None else architecture.heads
    paths = list(dict.fromkeys([*own, *head_paths(model, found.method, architecture)]))
    try:
        return stored_heads(model, paths, found.tensors, len(adapter.label_names))
    except AdapterError as error:
        error.where = f"evaluation.retained.{entry.name}: {error.where}"
        raise


def metric_of(entry: Retained, before: Predictions, after: Predictions) -> str | None:
    """Return the metric by which an entry is measured, or None if none is defined on its rows."""
    for name in (entry.task.main_metric, *entry.task.metrics, "perplexity"):
        if METRICS[name].higher is not None and None not in (point(name, before), point(name, after)):
            return name
    return None


def points_lost(metric: str, value: float, before: float) -> tuple[float, float]:
    """Return a change in points and in percent of the value before; positive is worse.

    Args:
        metric: Name of the metric.
        value: The change, after minus before.
        before: The value before.

    Example:
        >>> points_lost("accuracy", -0.02, 0.8)
        (2.0, 2.5)
        >>> points_lost("perplexity", 1.0, 20.0)
        (5.0, 5.0)
    """
    known = METRICS[metric]
    worse = value if known.higher is False else -value
    percent = 100 * worse / abs(before) if before else 0.0 if not worse else float(100 * (1 if worse > 0 else -1))
    return (known.scale * worse if known.words == " points" else percent), percent


def compared(entry: Retained, before: Predictions, after: Predictions, settings: EvaluationSettings) -> dict[str, Any]:
    """Return one entry as the manifest has it: the metric before and after, and the points that were lost."""
    metric = metric_of(entry, before, after)
    found: dict[str, Any] = {
        "task": entry.task.name,
        "origin": redact(entry.origin),
        "split": entry.split,
        "rows": after.rows,
        "metric": metric,
        "labels": None if entry.splits.labels is None else list(entry.splits.labels),
    }
    if metric is None:
        return {**found, "forgetting": None, "note": "no metric is defined on these rows: a class may be absent"}
    options: dict[str, Any] = {"confidence": settings.confidence, "resamples": settings.resamples}
    first, second = (metrics_of(each, names=[metric], **options)[metric] for each in (before, after))
    value = first["value"]
    assert value is not None
    try:
        difference = paired_difference(after, before, metric=metric, **options)
    except DataError as error:
        return {**found, "before": first, "after": second, "forgetting": None, "note": error.what}
    ends = [points_lost(metric, difference[part], value) for part in ("value", "low", "high")]
    lost, *interval = [points for points, _ in ends]
    return {
        **found,
        "before": first,
        "after": second,
        "difference": {part: difference[part] for part in ("value", "low", "high")},
        "forgetting": {"value": lost, "low": min(interval), "high": max(interval)},
        "percent": ends[0][1],
    }


def exceeds(limit: str, points: float, percent: float) -> bool:
    """Return True if a loss is more than a limit such as `2 points` or `5 %`.

    Args:
        limit: The most that may be lost.
        points: The loss in points.
        percent: The loss in percent of the value before.
    """
    most, _, unit = limit.partition(" ")
    return (percent if unit == "%" else points) > float(most)


def summary(entries: Mapping[str, Mapping[str, Any]], limit: str | None, seconds: float) -> dict[str, Any]:
    """Return the part `retained` of a manifest.

    Returns:
        ``entries``; ``forgetting``, that of the entry which lost most, with its ``name``; ``limit``; ``exceeded``, the
        names of the entries that lost more; ``seconds``.
    """
    known = {name: entry for name, entry in entries.items() if entry["forgetting"] is not None}
    worst = max(known, key=lambda name: float(known[name]["forgetting"]["value"]), default=None)
    exceeded = []
    if limit is not None:
        exceeded = [  # what is not known may be more
            name
            for name in entries
            if name not in known or exceeds(limit, known[name]["forgetting"]["value"], known[name]["percent"])
        ]
    return {
        "entries": dict(entries),
        "forgetting": None if worst is None else {"name": worst, **known[worst]["forgetting"]},
        "limit": limit,
        "exceeded": exceeded,
        "seconds": seconds,
    }


def refuse_forgotten(manifest: Mapping[str, Any], adapter: Path) -> None:
    """Raise for a finished run that lost more than `evaluation.max_forgetting` allows.

    Raises:
        ForgettingError: The message names what was lost.
    """
    retained = manifest.get("retained") or {}
    if retained.get("exceeded"):
        raise ForgettingError(
            f"the run has forgotten more than {retained['limit']}: {describe_losses(retained)}",
            where="evaluation.max_forgetting",
            hint="training.retain (replay, distillation, consolidation), a lower learning rate, or fewer epochs",
            recovered=f"the adapter, in {adapter}; merge, export and push refuse it without --allow-forgetting",
        )
