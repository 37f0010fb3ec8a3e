"""Progress lines of a comparison from the events of the active run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.aggregation import RunResult, TrialResult
from graftwerk.experiments.table import format_metric
from graftwerk.formatting import duration

NOTED = frozenset({"resume", "diagnosis", "bad_step", "memory", "warning", "early_stopping"})


class RunEvents:
    """Progress of the active run, from its events."""

    def __init__(self) -> None:
        self.step = self.steps = 0
        self.left_seconds: float | None = None

    def update(self, event: Mapping[str, Any]) -> str:
        """Update the progress from an event.

        Returns:
            Text to show for it, or "" if there is none.
        """
        kind = event["kind"]
        self.step = event["step"] or self.step
        if kind == "start":
            self.steps = event["total_steps"]
        elif kind == "progress":
            self.steps, self.left_seconds = event["total"], event.get("left_seconds")
        elif kind == "phase":
            return str(event["name"])
        elif kind == "resume":
            return f"resuming from step {self.step}"
        elif kind in NOTED:
            hint = f" ({event['hint']})" if event.get("hint") else ""
            return f"{event.get('text', kind)}{hint}"
        return ""


def result_line(run: TrialResult, metric: str) -> str:
    """Return the line of a finished run: `accuracy 78.6 (75.0 to 82.2), 61 s of training`.

    Args:
        run: The run; if it is one of several trials for a method, its metric on the validation rows, which settle that.
        metric: Name of the metric that decides.
    """
    measured = run.evaluation["metrics"] if isinstance(run, RunResult) else run.manifest["metrics"]["validation"]
    figure, title = measured[metric], ("" if isinstance(run, RunResult) else "validation ") + METRICS[metric].title
    time_taken = duration(run.manifest["cost"]["training_seconds"])
    if figure["value"] is None:
        return f"{title} {figure.get('note', 'is undefined')}, {time_taken} of training"
    low, high = figure["low"], figure["high"]
    between = "" if low is None else f" ({format_metric(low, metric)} to {format_metric(high, metric)})"
    return f"{title} {format_metric(figure['value'], metric)}{between}, {time_taken} of training"
