"""A comparison as text: for terminals with rich, for pipes and files in plain columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.evaluation.metrics import METRICS
from graftwerk.experiments.pareto import COSTS
from graftwerk.experiments.significance import (
    describe_difference,
    excludes_zero,
    find_difference,
    has_one_seed,
    swapped,
    verdict,
)
from graftwerk.formatting import byte_size, duration, milliseconds, short_count
from graftwerk.sanitize import clean

HEADINGS = (
    "method",
    "",
    "interval",
    "against the best",
    "SD of seeds",
    "trained",
    "adapter",
    "time",
    "memory",
    "ms/row 1",
    "ms/row 32",
)
FORGETTING = "forgetting"
"""Heading of one more column, where something was to be retained: points lost of what lost most."""
HOW = {
    "share": " in percent", "points": " in points", "correlation": ", times 100,", "score": " (less is better)",
    "tokens": "", "nats": " (less is better)",
}  # fmt: skip
"""How a metric's values are to be read, by its unit."""
DASH = "\N{EN DASH}"
LEFT = frozenset({0, 3})
"""Columns of words; the others are numbers, flush right."""
SPREAD = HEADINGS.index("SD of seeds")
"""Left out where every method has one seed."""


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per method, best first."""
    methods, metric = ranked(result), result["metric"]
    best = methods[0]["name"] if methods else ""
    chosen = (result.get("recommendation") or {}).get("method")
    with_forgetting = any("forgetting" in method["cost"] for method in methods)
    rows: list[tuple[str, ...]] = []
    for method in methods:
        figure, cost = method["figure"], method["cost"]
        rows.append(
            (
                method["name"] + (" *" if method["name"] == chosen else ""),
                format_metric(figure["value"], metric),
                DASH
                if figure["low"] is None
                else DASH.join(format_metric(figure[part], metric) for part in ("low", "high")),
                compare_to_best(result["differences"], method["name"], best, metric, result.get("margin")),
                format_metric(method.get("seed_spread"), metric),
                short_count(cost.get("trained_parameters")),
                byte_size(cost.get("adapter_bytes")),
                duration(cost.get("training_seconds")),
                byte_size(cost.get("peak_memory_bytes")),
                milliseconds(cost.get("latency_ms_batch_1")),
                milliseconds(cost.get("latency_ms_batch_32")),
                *((format_points(cost.get("forgetting")),) if with_forgetting else ()),
            )
        )
    return rows


def ranked(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the measured methods, best mean first."""
    measured = [method for method in result["methods"] if method.get("figure")]
    return sorted(measured, key=lambda method: -METRICS[result["metric"]].better(method["figure"]["value"], 0.0))


def format_metric(value: float | None, metric: str) -> str:
    """Format a value: a share in percent, BLEU and the like in points, perplexity unchanged; a dash for None."""
    return DASH if value is None else METRICS[metric].text(value)


def format_points(value: float | None) -> str:
    """Format points that were lost: -0.2 if they were gained."""
    return DASH if value is None else f"{value:.1f}".replace("-", "\N{MINUS SIGN}")


def compare_to_best(
    differences: Sequence[Any], name: str, best: str, metric: str = "accuracy", margin: float | None = None
) -> str:
    """Return the verdict against the best method: ``the best mean``, or ``worse by 3.1 [1.2, 5.0]`` and the like."""
    if name == best:
        return "the best mean"
    difference = swapped(find_difference(differences, name, best))  # how much the best is better
    known, found = METRICS[metric], verdict(difference, metric, margin)
    if excludes_zero(difference) and known.higher is False:
        difference = swapped(difference)
    low, value, high = (known.text(difference[part]) for part in ("low", "value", "high"))
    span = f"{value} [{low}, {high}]"
    if found == "better":
        return f"worse by {span}"
    if has_one_seed(difference) and excludes_zero(difference):
        return f"{'higher' if known.higher is False else 'lower'} by {span}, one seed"
    return f"{found} ({known.text(-difference['value'], signed=True)})"


def describe_result(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences below the table: metric, resolution, recommendation, failures, notes."""
    said = []
    seeds, known = len(result["seeds"]), METRICS[result["metric"]]
    said.append(
        f"{known.title}{HOW[known.unit]} on {result['rows']:,} {result['split']} rows, mean of {seeds} "
        f"seed{'s' if seeds > 1 else ''}; {100 * result['confidence']:g} % intervals, jointly for all differences."
    )
    if result.get("resolution"):
        found = result.get("detectable")
        power = f"; one of {known.text(found)}{known.words} would be shown four times in five" if found else ""
        said.append(
            "With these rows and seeds, differences under about "
            f"{known.text(result['resolution'])}{known.words} cannot be detected{power}."
        )
    elif result.get("resolution") == 0:
        said.append(
            "At least half of the pairs of methods gave the same answers on every row: nothing here tells those apart."
        )
    if result.get("seed_spread") is not None:
        spread = f"{known.text(result['seed_spread'])}{known.words}"
        said.append(
            f"Seeds of one method differ with a standard deviation of {spread}, pooled; the intervals take it to be "
            "the same for every method, and are too narrow between methods whose own is far above it."
        )
    said += describe_effects(result)
    said += describe_probabilities(result)
    if recommendation := result.get("recommendation"):
        said.append(f"* Recommended: {recommendation['method']}: {recommendation['reason']}.")
    merging = [method["name"] for method in ranked(result) if method.get("mergeable")]
    if merging:
        said.append(
            f"Latency is with the adapter attached. {_listed(merging)} can be merged into the base, which then "
            "takes no longer than without."
        )
    for method in result["methods"]:
        for seed, why in (method.get("failed") or {}).items():
            said.append(f"{method['name']}, seed {seed}, failed: {why}")
    return said + [f"Note: {note}." for note in result.get("notes", ())]


def describe_probabilities(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on how probably the best is better than each other, and one on the front in several costs."""
    methods, said = ranked(result), []
    if len(methods) > 1 and len(result["seeds"]) > 1:
        best, others = methods[0]["name"], []
        for method in methods[1:]:
            for each in result["differences"]:
                if {each["a"], each["b"]} == {best, method["name"]} and "p_better" in each:
                    chance = each["p_better"] if each["a"] == best else 1 - each["p_better"]
                    others.append(f"{method['name']} {100 * chance:.0f} %")
        if others:
            said.append(f"Probability that {best} is better, pair by pair: {', '.join(others)}.")
    pareto = result.get("pareto") or {}
    if len(pareto.get("methods", ())) > 1 and len(pareto["costs"]) > 1:
        costs = _listed([COSTS[cost] for cost in pareto["costs"]])
        title = METRICS[result["metric"]].title
        said.append(f"Not beaten in {title}, {costs} at once: {_listed(pareto['methods'])}.")
    return said


def describe_effects(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the effect of each axis of an ablation: the means, and the largest difference."""
    known, said = METRICS[result["metric"]], []
    for effect in (result.get("ablation") or {}).get("effects", ()):
        levels, differences = effect["levels"], effect["differences"]
        if not levels:
            said.append(f"Effect of {effect['axis']}: runs failed, and no combination has every value of it.")
            continue
        means = ", ".join(f"{level['value']}: {known.text(level['figure']['value'])}" for level in levels)
        cells = len(levels[0]["cells"])
        over = f", means over {cells} cells each" if cells > 1 else ""
        largest = max(differences, key=lambda each: abs(each["value"]))
        if known.better(largest["value"], 0.0) < 0:
            largest = swapped(largest)
        text = describe_difference(largest, result["metric"], result.get("margin"))
        said.append(f"Effect of {effect['axis']}{over}: {means}; {largest['a']} against {largest['b']}: {text}.")
    return said


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _columns(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings and rows that are shown."""
    rows = rows_of(result)
    headings: tuple[str, ...] = (*HEADINGS[:1], METRICS[result["metric"]].title, *HEADINGS[2:])
    if rows and len(rows[0]) > len(headings):
        headings += (FORGETTING,)
    if any(row[SPREAD] != DASH for row in rows):
        return headings, rows
    return headings[:SPREAD] + headings[SPREAD + 1 :], [row[:SPREAD] + row[SPREAD + 1 :] for row in rows]


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result as plain text, for pipes."""
    headings, rows = _columns(result)
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    text = [
        "  ".join(
            cell.ljust(width) if column in LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", *describe_result(result)])


def rich_table(result: Mapping[str, Any]) -> Any:
    """Format the result for a terminal, with the recommended method highlighted."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    headings, rows = _columns(result)
    for column, heading in enumerate(headings):
        made.add_column(heading, justify="left" if column in LEFT else "right", overflow="fold", no_wrap=column == 0)
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row), style="bold" if row[0].endswith(" *") else "")
    return Group(made, Text(""), *(Text(clean(sentence)) for sentence in describe_result(result)))
