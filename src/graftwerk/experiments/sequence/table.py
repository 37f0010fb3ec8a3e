"""A sequence as plain text: the measures of each variant, and the matrix of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.table import DASH, format_points
from graftwerk.formatting import duration
from graftwerk.sanitize import clean

MEASURES = {
    "mean": "mean at the end", "learning": "when learnt", "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
}  # fmt: skip


def plain(result: Mapping[str, Any]) -> str:
    """Return the result of a sequence as text.

    Args:
        result: Contents of `sequence.json`.
    """
    variants = result["variants"]
    known = [name for name in MEASURES if any(name in variant for variant in variants)]
    rows = [["variant", *(MEASURES[name] for name in known), "time"]]
    for variant in variants:
        figures = [_figure(variant.get(name)) for name in known]
        rows.append([variant["name"], *figures, duration(variant["cost"]["training_seconds"])])
    parts = [_columns(rows)]
    for variant in variants:
        if variant["matrix"]:
            parts += [f"{variant['name']}:", _columns(_matrix(result["tasks"], variant["matrix"]))]
    parts += sentences(result)
    return clean("\n\n".join(parts))


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what is to be said below the tables."""
    seeds = len(result["seeds"])
    text = (
        f"Points, mean of {seeds} seed{'s' if seeds > 1 else ''} with {100 * result['confidence']:g} % intervals over "
        f"rows{' and seeds' if seeds > 1 else ' alone: another seed may reverse them'}; forgetting: less is better. "
        "Rows of a matrix: after that task was learnt."
    )
    failed = [
        f"{variant['name']}, seed {seed}, failed: {why}"
        for variant in result["variants"]
        for seed, why in variant["failed"].items()
    ]
    return [text, *failed, *unmeasured(result)]


def unmeasured(result: Mapping[str, Any]) -> list[str]:
    """Return what is to be said of each cell that has no value."""
    names = [str(task["name"]) for task in result["tasks"]]
    return [
        f"{variant['name']}, {name} after {after}: {cell['note']}"
        for variant in result["variants"]
        for after, row in zip(names, variant["matrix"] or [], strict=False)
        for name, cell in zip(names, row, strict=True)
        if cell is not None and cell["value"] is None
    ]


def _figure(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return DASH
    low, high = measure["low"], measure["high"]
    return format_points(measure["value"]) + ("" if low is None else f" [{format_points(low)}, {format_points(high)}]")


def _matrix(
    tasks: Sequence[Mapping[str, Any]], matrix: Sequence[Sequence[Mapping[str, Any] | None]]
) -> list[list[str]]:
    names = [str(task["name"]) for task in tasks]
    rows = [["after", *names]]
    for name, cells in zip(names, matrix, strict=True):
        shown = [
            "" if cell is None else DASH if cell["value"] is None else METRICS[task["metric"]].text(cell["value"])
            for task, cell in zip(tasks, cells, strict=True)
        ]
        rows.append([name, *shown])
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
