"""The page of a sequence: the measures of each variant, how each task fared, the matrix, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup, tag
from graftwerk.reporting.files import at, items, mapping, mappings, number, words
from graftwerk.reporting.interval_plot import scale_of, strip
from graftwerk.reporting.line_charts import Chart, Curve, charts

MEASURES = {
    "mean": ("Mean at the end", "of all tasks, after the last was learnt"),
    "learning": ("When learnt", "each task right after it was learnt"),
    "backward_transfer": ("Backward transfer", "what later tasks changed; below zero, they cost something"),
    "forgetting": ("Forgetting", "from the best state of a task before the last to the end; less is better"),
}
KINDS = ("metric", "rate", "train")
"""Classes of the curves, in turn."""


def sequence_page(folder: Path, result: Mapping[str, Any]) -> str:
    """Return the page of a sequence as HTML."""
    variants = [variant for variant in mappings(result, "variants") if items(variant, "matrix")]
    tasks = mappings(result, "tasks")
    sections = [_failures(result), _measures(variants), *(_variant(variant, tasks) for variant in variants)]
    sections += [_differences(result), page.repeat(words(result, "command"))]
    order = ", then ".join(words(task, "name") for task in tasks)
    return page.document(
        title=f"Sequence: {folder.name}",
        kicker=f"Learning in sequence on {words(result, 'model') or 'a model'}",
        headline=page.prose(_headline(result, variants)),
        deck=[f"{order}. {numbers.plural(len(items(result, 'seeds')), 'seed')}."],
        sections=[part for part in sections if part],
        footer=f"Written by graftwerk {words(result, 'graftwerk')} from sequence.json in {folder.name}.",
    )


def _headline(result: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    if words(result, "status") != "finished":
        return "The sequence is not finished"
    if not variants:
        return "No sequence could be finished"
    known = {words(each, "name"): number(each, "forgetting", "value") for each in variants}
    least = min(known, key=lambda name: float("inf") if known[name] is None else float(known[name] or 0.0))
    most = max(known, key=lambda name: float("-inf") if known[name] is None else float(known[name] or 0.0))
    if known[least] == known[most] and len(variants) > 1:
        return f"All variants forget the same: {numbers.lost(known[least])} points"
    if len(variants) == 1:
        return f"{least} forgets {numbers.lost(known[least])} points"
    return f"{least} forgets least ({numbers.lost(known[least])} points), {most} most ({numbers.lost(known[most])})"


def _failures(result: Mapping[str, Any]) -> Markup:
    said = [
        page.message("Failed:", f"{words(variant, 'name')}, seed {seed}: {why}", grave=True)
        for variant in mappings(result, "variants")
        for seed, why in mapping(variant, "failed").items()
    ]
    names = [words(task, "name") for task in mappings(result, "tasks")]
    said += [
        page.message("Not measured:", f"{words(variant, 'name')}, {name} after {names[after]}: {words(cell, 'note')}")
        for variant in mappings(result, "variants")
        for after in range(len(names))
        for task, name in enumerate(names[: after + 1])
        if (cell := at_row(items(variant, "matrix"), after, task)) and number(cell, "value") is None
    ]
    return page.section("Before you read the results", page.messages(said)) if said else Markup()


def _measures(variants: Sequence[Mapping[str, Any]]) -> Markup:
    parts: list[Any] = []
    for key, (title, what) in MEASURES.items():
        known = [variant for variant in variants if number(variant, key, "value") is not None]
        if not known:
            continue
        ends = [number(variant, key, part) for variant in known for part in ("value", "low", "high")]
        seeds = {words(variant, "name"): _seeds(variant, key) for variant in known}
        scale = scale_of(
            [*ends, *(value for values in seeds.values() for value in values)], zero=key not in ("mean", "learning")
        )
        rows = []
        for variant in known:
            value, low, high = (number(variant, key, part) for part in ("value", "low", "high"))
            interval = DASH if low is None else f"{numbers.lost(low)} to {numbers.lost(high)}"
            drawing = strip(
                scale, value or 0.0, low, high, seeds[words(variant, "name")],
                zero=key not in ("mean", "learning"), said=f"{numbers.lost(value)}, interval {interval}",
            )  # fmt: skip
            rows.append(("", [words(variant, "name"), numbers.lost(value), interval, drawing]))
        headings = [("Variant", ""), ("Points", "number"), ("Interval", "number"), ("Mean, interval, each seed", "")]
        parts += [tag("h3", title), page.paragraph(f"{what[:1].upper()}{what[1:]}.", class_="note")]
        parts.append(page.table(title, headings, rows))
    return page.section("What was learnt and what was forgotten", *parts) if parts else Markup()


def _seeds(variant: Mapping[str, Any], key: str) -> list[float]:
    values = [number(variant, key, "seeds", seed) for seed in mapping(variant, key, "seeds")]
    return [value for value in values if value is not None]


def _variant(variant: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> Markup:
    matrix = items(variant, "matrix")
    metrics = [words(task, "metric") for task in tasks]
    names = [words(task, "name") for task in tasks]
    rows = []
    for after, name in enumerate(names):
        cells = [_cell(at_row(matrix, after, task), metrics[task]) for task in range(len(names))]
        rows.append(("", [name, *cells]))
    headings = [
        ("After", ""),
        *((f"{name}: {numbers.metric_name(metric)}", "number") for name, metric in zip(names, metrics, strict=True)),
    ]
    drawing = None
    if all(numbers.unit(metric) == " points" for metric in metrics):
        curves = [
            Curve(name, KINDS[task % len(KINDS)], [
                (after + 1.0, _scaled(at_row(matrix, after, task), metrics[task])) for after in range(task, len(names))
            ])
            for task, name in enumerate(names)
        ]  # fmt: skip
        (drawn,) = charts([Chart(curves, "Points", numbers.lost, least=2.0, over="Task")], steps=float(len(names)))
        drawing = page.figure(drawn, "Each task from when it was learnt to the end.")
    cost = mapping(variant, "cost")
    spent = f"Training took {numbers.seconds(number(cost, 'training_seconds'))} a seed"
    if more := number(cost, "retention_seconds"):
        spent += f", {numbers.seconds(more)} of it against forgetting"
    return page.section(
        words(variant, "name"), drawing, page.table(f"Matrix of {words(variant, 'name')}", headings, rows),
        page.paragraph(f"{spent}.", class_="note"),
    )  # fmt: skip


def at_row(matrix: Sequence[Any], after: int, task: int) -> Mapping[str, Any]:
    """Return a cell of a matrix, empty above its diagonal."""
    row = matrix[after] if after < len(matrix) else None
    cell = row[task] if isinstance(row, list) and task < len(row) else None
    return cell if isinstance(cell, Mapping) else {}


def _scaled(cell: Mapping[str, Any], metric: str) -> float | None:
    value = number(cell, "value")
    return None if value is None else numbers.scale(metric) * value


def _cell(cell: Mapping[str, Any], metric: str) -> str:
    value = number(cell, "value")
    if value is None:
        return DASH if cell else ""
    interval = "" if number(cell, "low") is None else f" ({numbers.interval_of(metric, cell)})"
    return f"{numbers.bare(metric, value)}{interval}"


def _differences(result: Mapping[str, Any]) -> Markup:
    rows = []
    for key, (title, _) in MEASURES.items():
        for each in mappings(result, "differences", key):
            low, high = number(each, "low"), number(each, "high")
            apart = (
                low is not None and high is not None and (low > 0 or high < 0) and at(each, "over_seeds") is not False
            )
            interval = f"{numbers.lost(low)} to {numbers.lost(high)}"
            cells = [
                f"{words(each, 'a')} against {words(each, 'b')}",
                title,
                numbers.lost(number(each, "value")),
                interval,
            ]
            rows.append(("", [*cells, "shown" if apart else "not shown"]))
    if not rows:
        return Markup()
    headings = [("Variants", ""), ("Measure", ""), ("Difference", "number"), ("Interval", "number"), ("", "")]
    note = "The intervals of a measure hold together. One seed shows nothing of another."
    return page.section("Differences", page.table("Differences", headings, rows), page.paragraph(note, class_="note"))
