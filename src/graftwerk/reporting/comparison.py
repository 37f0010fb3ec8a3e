"""The page of a comparison: its result, the trade-off, metrics and costs, the differences, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page, verdicts
from graftwerk.reporting.ablation import ablation
from graftwerk.reporting.data import data_section, measured_on, origin_facts
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import REPORT, items, mapping, mappings, number, words
from graftwerk.reporting.tables import costs, differences, other_metrics, quality
from graftwerk.reporting.tradeoff import COSTS, Point, tradeoff
from graftwerk.reporting.tuning import tuning_section


def comparison_page(folder: Path, result: Mapping[str, Any]) -> str:
    """Return the page of a comparison as HTML.

    Args:
        folder: Folder of the comparison, to find the runs that have pages of their own.
        result: Contents of `comparison.json`.
    """
    methods = verdicts.measured(result)
    found = verdicts.differences(result)
    metric = numbers.metric_name(words(result, "metric") or "quality")
    sections = [_state(result), *_results(result, methods, found, metric)]
    sections += [tuning_section(result)]
    sections += [_runs(folder, result, metric), _failures(result), data_section(mapping(result, "data"))]
    again = "The same command resumes a stopped comparison, and does nothing once all runs are done."
    sections += [_how(result, metric), page.repeat(words(result, "command"), again)]
    compared = numbers.plural(len(mappings(result, "methods")), "method")
    return page.document(
        title=f"Comparison: {folder.name}",
        kicker=f"Comparison of {compared} on {words(result, 'model') or 'a model'}",
        headline=verdicts.headline(result),
        deck=[
            verdicts.reason(result),
            " ".join(filter(None, [_measured_on(result, metric), verdicts.resolution(result)])),
        ],
        sections=[part for part in sections if part],
        footer=f"Written by graftwerk {words(result, 'graftwerk')} from comparison.json in {folder.name}.",
    )


def _measured_on(result: Mapping[str, Any], metric: str) -> str:
    seeds = items(result, "seeds")
    if not verdicts.measured(result):
        return ""
    mean = f"mean over {numbers.plural(len(seeds), 'seed')}" if len(seeds) > 1 else "one seed only"
    return f"{numbers.title(metric)} on {measured_on(result)}, {mean}."


def _state(result: Mapping[str, Any]) -> Markup:
    """Return the section of notes to read before the results."""
    said = [page.message("Note:", note) for note in map(str, items(result, "notes"))]
    if words(result, "status") == "running":
        text = "Some runs are still to do; the command at the end of this page resumes the comparison."
        said.insert(0, page.message("Not finished.", text, grave=True))
    return page.section("Before you read the results", page.messages(said)) if said else Markup()


def _results(
    result: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], found: Sequence[verdicts.Difference], metric: str
) -> list[Markup]:
    if not methods:
        return []
    chosen = verdicts.recommended(result)
    fronts = {cost: [str(name) for name in items(result, "front", cost)] for cost in mapping(result, "front")}
    points = [_point(method, words(result, "metric"), chosen) for method in methods]
    caption = [
        "Each point is a method: its mean, and a bar for the interval. ",
        "Lower" if words(result, "metric") in numbers.LESS_IS_BETTER else "Higher",
        " is better, further left is cheaper. ",
        "The dotted line is the Pareto front: for its methods, nothing that was tried is as good and cheaper. ",
        tag("span", class_="key recommended"), "recommended  ",
        tag("span", class_="key on-front"), "on the front  ",
        tag("span", class_="key"), "beaten: another is no worse and no dearer. ",
        "Point at a method, or reach it with the Tab key, for all its metrics and costs.",
    ]  # fmt: skip
    return [
        page.section(
            "Quality against cost", page.figure(tradeoff(points, fronts, words(result, "metric")), join(caption))
        ),
        page.section(
            "All results",
            quality(methods, found, metric, chosen, result),
            tag("h3", "What each method costs"),
            costs(methods, chosen),
            page.paragraph(
                "Medians over seeds. Latency is a forward pass, per row, without tokenizing.", class_="note"
            ),
            other_metrics(methods, words(result, "metric"), chosen),
        ),
        ablation(result, metric),
        differences(found, result, metric),
    ]


def _point(method: Mapping[str, Any], metric: str, chosen: str | None) -> Point:
    figure = mapping(method, "figure")
    costs = {cost.key: number(method, "cost", cost.key) for cost in COSTS}
    name = " ".join(words(method, "name").split())
    lines = [
        name,
        f"{numbers.title(numbers.metric_name(metric))}\t{numbers.value_of(metric, number(figure, 'value'))}",
        f"Interval\t{numbers.interval_of(metric, figure)}",
    ]
    lines += [f"{numbers.title(cost.name)}\t{cost.show(costs[cost.key])}" for cost in COSTS]
    return Point(
        words(method, "name"), number(figure, "value") or 0.0, number(figure, "low"), number(figure, "high"),
        costs, "\n".join(lines), words(method, "name") == chosen,
    )  # fmt: skip


def _runs(folder: Path, result: Mapping[str, Any], metric: str) -> Markup:
    rows = []
    for method in mappings(result, "methods"):
        for seed, run in mapping(method, "runs").items():
            best = number(run, "best", "step")
            cells = [
                _link(folder, words(run, "folder") or words(method, "name")),
                seed,
                numbers.bare(words(result, "metric"), number(run, "value")),
                numbers.seconds(number(run, "training_seconds")),
                numbers.byte_size(number(run, "peak_memory_bytes")),
                DASH if best is None else f"{best:,.0f}",
            ]
            rows.append(("", cells))
    if not rows:
        return Markup()
    headings = [
        ("Run", ""), ("Seed", "number"), (numbers.heading(words(result, "metric")), "number"), ("Training", "number"),
        ("Peak memory", "number"), ("Best step", "number"),
    ]  # fmt: skip
    summary = tag("summary", f"All {numbers.plural(len(rows), 'run')}, one by one")
    return page.section("Every run", tag("details", summary, page.table("Every run", headings, rows)))


def _link(folder: Path, name: str) -> Any:
    """Link to the run's own page, if it has one; a name that would lead out of the folder is no link."""
    if not name or "/" in name or "\\" in name or name.startswith(".") or "\0" in name or len(name) > 200:
        return name
    if not (folder / name / REPORT).is_file():
        return name
    return tag("a", name, href=f"./{quote(name)}/{REPORT}")


def _failures(result: Mapping[str, Any]) -> Markup:
    said = []
    for method in mappings(result, "methods"):
        for seed, why in mapping(method, "failed").items():
            said.append(
                page.message(
                    f"{words(method, 'name')}, seed {seed}:",
                    words(why) or "no reason is stored",
                    grave=True,
                )
            )
    return page.section("Runs that failed", page.messages(said)) if said else Markup()


def _how(result: Mapping[str, Any], metric: str) -> Markup:
    confidence = number(result, "confidence")
    training = mapping(result, "training")
    rate = words(training, "learning_rate")
    rows: list[tuple[str, Any]] = [
        ("Model", words(result, "model")),
        ("Base fingerprint", words(result, "base_fingerprint")),
        ("Task", words(result, "task")),
        ("Measured on", measured_on(result)),
        ("Seeds", words(result, "seeds")),
        ("Labels", words(result, "labels")),
        *origin_facts(mapping(result, "data")),
        ("Confidence", "" if confidence is None else f"{100 * confidence:g} %"),
        (
            "Intervals",
            (
                "over rows, by bootstrap draws of them for all runs together, and over seeds, by the variance between "
                "them, pooled over the methods; those of differences hold for all pairs at once"
                if len(items(result, "seeds")) > 1
                else "over rows alone, by bootstrap draws of them for all models together: they compare the models at "
                "hand, and another training seed may reverse them; those of differences hold for all pairs at once"
            ),
        ),
        ("Learning rate", "each method's own" if rate == "auto" else rate),
        ("Epochs", words(training, "num_train_epochs") if not words(training, "max_steps") else ""),
        ("Steps", words(training, "max_steps")),
        ("Rows a step", words(training, "per_device_train_batch_size")),
        (
            "Machine",
            ", ".join(f"{key} {words(result, 'machine', key)}" for key in mapping(result, "machine")),
        ),
        ("Versions", ", ".join(f"{key} {words(result, 'versions', key)}" for key in mapping(result, "versions"))),
        ("Training in all", numbers.seconds(number(result, "seconds")) if number(result, "seconds") else ""),
    ]
    methods = [
        (words(method, "name"), numbers.settings(mapping(method, "settings")) or "no settings")
        for method in mappings(result, "methods")
    ]
    return page.section(
        "How it was measured", page.facts(rows), tag("h3", "Settings of the methods"), page.facts(methods)
    )
