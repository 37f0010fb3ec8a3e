"""The page of a comparison: what came out, the trade-off, every figure, what the differences are worth, how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from graftwerk.report import numbers, page, verdicts
from graftwerk.report.data import findings_section, measured_on, origin_facts
from graftwerk.report.escape import Markup, join, tag
from graftwerk.report.files import REPORT, items, mapping, mappings, number, words
from graftwerk.report.strips import scale_of, strip
from graftwerk.report.tradeoff import COSTS, Point, tradeoff


def comparison_page(folder: Path, result: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        folder: Of the comparison, to see which runs have pages of their own.
        result: `comparison.json`.
    """
    methods = verdicts.measured(result)
    found = verdicts.differences(result)
    metric = numbers.metric_name(words(result, "metric") or "quality")
    sections = [_state(result), *_results(result, methods, found, metric)]
    sections += [_runs(folder, result, metric), _failures(result), findings_section(mapping(result, "data"))]
    sections += [_how(result, metric), _repeat(result)]
    return page.document(
        title=f"Comparison: {folder.name}",
        kicker=f"Comparison of {numbers.plural(len(mappings(result, 'methods')), 'method')} on {words(result, 'model') or 'a model'}",
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
    """What has to be known before any figure is believed."""
    said = [page.message("Note:", note) for note in map(str, items(result, "notes"))]
    if words(result, "status") == "running":
        text = "Some runs are still to do, or the comparison was stopped; the command at the end of this page goes on with it."
        said.insert(0, page.message("Not finished.", text, grave=True))
    return page.section("Before you read the figures", page.messages(said)) if said else Markup()


def _results(
    result: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], found: Sequence[verdicts.Difference], metric: str
) -> list[Markup]:
    if not methods:
        return []
    chosen = verdicts.recommended(result)
    fronts = {cost: [str(name) for name in items(result, "front", cost)] for cost in mapping(result, "front")}
    points = [_point(method, metric, chosen) for method in methods]
    caption = [
        "Each point is a method: its mean, and a bar for the interval. Higher is better, further left is cheaper. The dotted line is the "
        "Pareto front: nothing else that was tried is at least as good and cheaper. ",
        tag("span", class_="key recommended"), "recommended  ",
        tag("span", class_="key on-front"), "on the front  ",
        tag("span", class_="key"), "beaten on both counts. Point at a method, or reach it with the Tab key, for all its figures.",
    ]  # fmt: skip
    return [
        page.section("Quality against cost", page.figure(tradeoff(points, fronts, metric), join(caption))),
        page.section(
            "The figures",
            _quality(methods, found, metric, chosen, result),
            tag("h3", "What each method costs"),
            _costs(methods, chosen),
            page.paragraph(
                "Medians over seeds. Latency is a forward pass, per row, without tokenizing.", class_="note"
            ),
            _other_metrics(methods, words(result, "metric"), chosen),
        ),
        _differences(found, result, metric),
    ]


def _point(method: Mapping[str, Any], metric: str, chosen: str | None) -> Point:
    figure = mapping(method, "figure")
    costs = {cost.key: number(method, "cost", cost.key) for cost in COSTS}
    name = " ".join(words(method, "name").split())
    lines = [
        name,
        f"{numbers.title(metric)}\t{numbers.percent(number(figure, 'value'))}",
        f"Interval\t{numbers.interval(figure)}",
    ]
    lines += [f"{numbers.title(cost.name)}\t{cost.show(costs[cost.key])}" for cost in COSTS]
    return Point(
        words(method, "name"), number(figure, "value") or 0.0, number(figure, "low"), number(figure, "high"),
        costs, "\n".join(lines), words(method, "name") == chosen,
    )  # fmt: skip


def _name(method: Mapping[str, Any], chosen: str | None, settings: bool = False) -> Markup:
    said = [tag("span", "recommended", class_="tag")] if words(method, "name") == chosen else []
    if settings:
        said.append(tag("span", words(method, "title"), class_="tag"))
    return join([words(method, "name"), *said])


def _row_class(method: Mapping[str, Any], chosen: str | None) -> str:
    return "recommended" if words(method, "name") == chosen else ""


def _quality(
    methods: Sequence[Mapping[str, Any]],
    found: Sequence[verdicts.Difference],
    metric: str,
    chosen: str | None,
    result: Mapping[str, Any],
) -> Markup:
    seeds = {words(method, "name"): _seed_values(method) for method in methods}
    bounds = [number(method, "figure", part) for method in methods for part in ("value", "low", "high")]
    scale = scale_of([*bounds, *(value for values in seeds.values() for value in values)])
    best, planned = words(methods[0], "name"), len(items(result, "seeds"))
    rows = []
    for method in methods:
        name, figure = words(method, "name"), mapping(method, "figure")
        value = number(figure, "value") or 0.0
        said = f"{numbers.percent(value)}, interval {numbers.interval(figure)}; seeds: {', '.join(map(numbers.bare_percent, seeds[name]))}"
        drawing = strip(
            scale,
            value,
            number(figure, "low"),
            number(figure, "high"),
            seeds[name],
            kind=_row_class(method, chosen),
            said=said,
        )
        against = "the best mean" if name == best else _against(verdicts.between(found, best, name))
        runs = f"{len(seeds[name])} of {planned}" if planned and len(seeds[name]) < planned else str(len(seeds[name]))
        cells = [
            _name(method, chosen, True),
            numbers.bare_percent(value),
            numbers.interval(figure),
            drawing,
            runs,
            against,
        ]
        rows.append((_row_class(method, chosen), cells))
    headings = [
        ("Method", ""), (f"{numbers.title(metric)}, %", "number"), ("Interval", "number"),
        ("Mean, interval, each seed", ""), ("Seeds", "number"), ("Against the best", "words"),
    ]  # fmt: skip
    return page.table("Quality of each method", headings, rows)


def _against(difference: verdicts.Difference | None) -> str:
    """Seen from the best: how much worse this one is."""
    if difference is None:
        return numbers.DASH
    if difference.verdict == "better":
        low, high = (f"{100 * bound:.1f}" for bound in (difference.low, difference.high))
        return f"worse by {100 * difference.value:.1f} points ({low} to {high})"
    return f"no difference shown ({numbers.signed_points(-difference.value)})"


def _seed_values(method: Mapping[str, Any]) -> list[float]:
    values = [number(run, "value") for run in mapping(method, "runs").values()]
    return [value for value in values if value is not None]


def _costs(methods: Sequence[Mapping[str, Any]], chosen: str | None) -> Markup:
    headings = [
        ("Method", ""), ("Trained parameters", "number"), ("Share", "number"), ("Adapter", "number"), ("Training", "number"),
        ("Peak memory", "number"), ("Latency, 1 row", "number"), ("Latency, 32 rows", "number"),
    ]  # fmt: skip
    rows = []
    for method in methods:
        cost = mapping(method, "cost")
        cells = [
            _name(method, chosen),
            numbers.exact(number(cost, "trained_parameters")),
            numbers.share(number(method, "parameters", "share")),
            numbers.byte_size(number(cost, "adapter_bytes")),
            numbers.seconds(number(cost, "training_seconds")),
            numbers.byte_size(number(cost, "peak_memory_bytes")),
            numbers.milliseconds(number(cost, "latency_ms_batch_1")),
            numbers.milliseconds(number(cost, "latency_ms_batch_32")),
        ]
        rows.append((_row_class(method, chosen), cells))
    return page.table("Cost of each method", headings, rows)


def _other_metrics(methods: Sequence[Mapping[str, Any]], main: str, chosen: str | None) -> Markup | None:
    names = list(dict.fromkeys(name for method in methods for name in mapping(method, "metrics") if name != main))
    if not names:
        return None
    rows = []
    for method in methods:
        cells: list[Any] = [_name(method, chosen)]
        for name in names:
            figure = mapping(method, "metrics", name)
            cells.append(
                join(
                    [numbers.bare_percent(number(figure, "value")), tag("span", numbers.interval(figure), class_="tag")]
                )
            )
        rows.append((_row_class(method, chosen), cells))
    headings = [("Method", ""), *((f"{numbers.title(numbers.metric_name(name))}, %", "number") for name in names)]
    return join([tag("h3", "Other metrics"), page.table("Other metrics of each method", headings, rows)])


def _differences(found: Sequence[verdicts.Difference], result: Mapping[str, Any], metric: str) -> Markup:
    if not found:
        return Markup()
    scale = scale_of([bound for d in found for bound in (d.low, d.value, d.high)], zero=True)
    rows = []
    for d in found:
        shown = d.verdict != "no difference shown"
        limits = f"{numbers.signed_points(d.low)} to {numbers.signed_points(d.high)}"
        said = f"{d.a} against {d.b}: {numbers.signed_points(d.value)} points, interval {limits}"
        kind = "" if shown else "unshown"
        drawing = strip(scale, d.value, d.low, d.high, zero=True, kind=kind, said=said)
        verdict = f"{d.a} is {d.verdict}" if shown else d.verdict
        p = numbers.DASH if d.p is None else "< 0.001" if d.p < 0.001 else f"{d.p:.3f}"
        rows.append(
            (
                "shown" if shown else "unshown",
                [f"{d.a} against {d.b}", numbers.signed_points(d.value), limits, drawing, p, verdict],
            )
        )
    headings = [
        ("Pair", ""), ("Points", "number"), ("Interval", "number"), ("Beside zero", ""), ("p", "number"), ("Verdict", "verdict"),
    ]  # fmt: skip
    level = _confidence(result)
    text = (
        f"Every pair on the same rows and seeds, in points of {metric}. {level}The intervals hold all at once, and p is adjusted for the "
        "number of pairs: a difference counts as shown only if its interval leaves zero out."
    )
    return page.section(
        "What the differences are worth",
        page.paragraph(text),
        page.table("Paired differences", headings, rows, class_="pairs"),
    )


def _confidence(result: Mapping[str, Any]) -> str:
    confidence = number(result, "confidence")
    return "" if confidence is None else f"Confidence {100 * confidence:g} %. "


def _runs(folder: Path, result: Mapping[str, Any], metric: str) -> Markup:
    rows = []
    for method in mappings(result, "methods"):
        for seed, run in mapping(method, "runs").items():
            best = number(run, "best", "step")
            cells = [
                _link(folder, words(run, "folder") or words(method, "name")),
                seed,
                numbers.bare_percent(number(run, "value")),
                numbers.seconds(number(run, "training_seconds")),
                numbers.byte_size(number(run, "peak_memory_bytes")),
                numbers.DASH if best is None else f"{best:,.0f}",
            ]
            rows.append(("", cells))
    if not rows:
        return Markup()
    headings = [
        ("Run", ""), ("Seed", "number"), (f"{numbers.title(metric)}, %", "number"), ("Training", "number"),
        ("Peak memory", "number"), ("Best step", "number"),
    ]  # fmt: skip
    summary = tag("summary", f"All {numbers.plural(len(rows), 'run')}, one by one")
    return page.section("Every run", tag("details", summary, page.table("Every run", headings, rows)))


def _link(folder: Path, name: str) -> Any:
    """To the run's own page, where it has one; a name that would lead out of the folder is no link."""
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
                    words({"why": why}, "why") or "no reason is stored",
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
        ("Labels", numbers.listed([str(name) for name in items(result, "labels")])),
        *origin_facts(mapping(result, "data")),
        ("Confidence", "" if confidence is None else f"{100 * confidence:g} %"),
        (
            "Intervals",
            "bootstrap: held-out rows and seeds are drawn together for all methods; an interval of a mean holds what other rows and other "
            "seeds would change, those of differences hold for all pairs at once",
        ),
        ("Learning rate", "each method's own" if rate == "auto" else rate),
        ("Epochs", words(training, "num_train_epochs") if not words(training, "max_steps") else ""),
        ("Steps", words(training, "max_steps")),
        ("Rows a step", words(training, "per_device_train_batch_size")),
        (
            "Machine",
            ", ".join(
                f"{key} {words(value_, 'v')}"
                for key, value in mapping(result, "machine").items()
                if (value_ := {"v": value})
            ),
        ),
        ("Training in all", numbers.seconds(number(result, "seconds")) if number(result, "seconds") else ""),
    ]
    methods = [
        (words(method, "name"), numbers.settings(mapping(method, "settings")) or "no settings")
        for method in mappings(result, "methods")
    ]
    return page.section(
        "How it was measured", page.facts(rows), tag("h3", "Settings of the methods"), page.facts(methods)
    )


def _repeat(result: Mapping[str, Any]) -> Markup:
    line = words(result, "command")
    if not line:
        return page.section("Repeat it", page.paragraph("The command is not stored.", class_="missing"))
    text = "The same command goes on where a stopped comparison was, and does nothing where all is done."
    return page.section("Repeat it", page.command(line), page.paragraph(text, class_="note"))
