"""A search as plain text: its best trials, the final comparison, notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.search.space import value_text
from graftwerk.experiments.table import HOW, format_metric
from graftwerk.formatting import columns, duration

SHOWN = 8
"""Trials of the table; the report has all."""
STATES = (
    ("pruned", "given up early"),
    ("infeasible", "too large for the memory"),
    ("fail", "failed"),
    ("running", "to do"),
)


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result as plain text."""
    metric, known = result["metric"], METRICS[result["metric"]]
    done = [trial for trial in result["trials"] if trial["value"] is not None]
    done.sort(key=lambda trial: -known.better(trial["value"], 0.0))
    keys = [axis["key"] for axis in result["space"]]
    lines = [("trial", known.title, "time", *(key.partition(".")[2] for key in keys))]
    lines += [
        (
            str(trial["number"]),
            format_metric(trial["value"], metric),
            duration(trial["seconds"]),
            *(value_text(trial["settings"].get(key)) for key in keys),
        )
        for trial in done[:SHOWN]
    ]
    return "\n".join([columns(lines, (), rule=True), "", *describe_result(result)])


def describe_result(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences below the table: how many trials, the final comparison, notes."""
    metric, known = result["metric"], METRICS[result["metric"]]
    states = [trial["state"] for trial in result["trials"]]
    counts = ", ".join(f"{states.count(state)} {said}" for state, said in STATES if state in states)
    trials = f"{len(states)} trial{'s' if len(states) != 1 else ''}"
    said = [f"{trials}{f' ({counts})' if counts else ''}; {known.title}{HOW[known.unit]} on the validation rows."]
    if result["status"] != "finished":
        return [*said, "Not finished: the same command resumes the search."]
    found = [] if result["best"]["trial"] is None else [("best", "found")]
    for name, title in [*found, ("default", "defaults")]:
        figure = result[name]["metrics"].get(metric)
        settings = ", ".join(
            f"{key.partition('.')[2]} {value_text(value)}" for key, value in result[name]["settings"].items()
        )
        if figure:
            low, high = format_metric(figure["low"], metric), format_metric(figure["high"], metric)
            said.append(f"{title:<9}{format_metric(figure['value'], metric)} ({low} to {high})  {settings}")
    rows = f"{known.title}{HOW[known.unit]} on {result['rows']:,} {result['split']} rows" if result.get("rows") else ""
    seeds = len(result["seeds"])
    said += [f"{rows}, mean of {seeds} fresh seeds; {100 * result['confidence']:g} % intervals." if rows else "", ""]
    said.append(result["text"])
    failed = [trial for trial in result["trials"] if trial.get("reason")]
    said += [f"trial {trial['number']} {dict(STATES)[trial['state']]}: {trial['reason']}" for trial in failed[:SHOWN]]
    return [*said, *(f"Note: {note}." for note in result["notes"])]
