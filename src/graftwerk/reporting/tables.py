"""Tables: quality, costs, other metrics and paired differences of a comparison; each data set of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page, verdicts
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import items, mapping, number, words
from graftwerk.reporting.interval_plot import scale_of, strip


def _name(method: Mapping[str, Any], chosen: str | None, settings: bool = False) -> Markup:
    said = [tag("span", "recommended", class_="tag")] if words(method, "name") == chosen else []
    if settings:
        said.append(tag("span", words(method, "title"), class_="tag"))
    return join([words(method, "name"), *said])


def _row_class(method: Mapping[str, Any], chosen: str | None) -> str:
    return "recommended" if words(method, "name") == chosen else ""


def quality(
    methods: Sequence[Mapping[str, Any]],
    found: Sequence[verdicts.Difference],
    metric: str,
    chosen: str | None,
    result: Mapping[str, Any],
) -> Markup:
    """Return the table of the main metric: mean, interval and seeds of each method, and its distance to the best."""
    seeds = {words(method, "name"): _seed_values(method) for method in methods}
    bounds = [number(method, "figure", part) for method in methods for part in ("value", "low", "high")]
    scale = scale_of([*bounds, *(value for values in seeds.values() for value in values)])
    best, planned = words(methods[0], "name"), len(items(result, "seeds"))
    key = words(result, "metric")
    rows = []
    for method in methods:
        name, figure = words(method, "name"), mapping(method, "figure")
        value = number(figure, "value") or 0.0
        each = ", ".join(numbers.bare(key, one) for one in seeds[name])
        said = f"{numbers.value_of(key, value)}, interval {numbers.interval_of(key, figure)}; seeds: {each}"
        drawing = strip(
            scale,
            value,
            number(figure, "low"),
            number(figure, "high"),
            seeds[name],
            kind=_row_class(method, chosen),
            said=said,
        )
        against = "the best mean" if name == best else _against(verdicts.find_difference(found, best, name), key)
        runs = f"{len(seeds[name])} of {planned}" if planned and len(seeds[name]) < planned else str(len(seeds[name]))
        cells = [
            _name(method, chosen, True),
            numbers.bare(key, value),
            numbers.interval_of(key, figure),
            drawing,
            runs,
            numbers.bare(key, number(method, "seed_spread")),
            against,
        ]
        rows.append((_row_class(method, chosen), cells))
    headings = [
        ("Method", ""), (numbers.heading(key), "number"), ("Interval", "number"),
        ("Mean, interval, each seed", ""), ("Seeds", "number"), ("SD of seeds", "number"),
        ("Against the best", "words"),
    ]  # fmt: skip
    return page.table("Quality of each method", headings, rows)


def _against(difference: verdicts.Difference | None, metric: str) -> str:
    """Return how much worse a method is than the best."""
    if difference is None:
        return DASH
    if difference.verdict == "better":
        low, high = (numbers.bare(metric, bound) for bound in (difference.low, difference.high))
        return f"worse by {numbers.bare(metric, difference.value)}{numbers.unit(metric)} ({low} to {high})"
    if difference.excludes_zero:  # with one seed
        low, high = (numbers.bare(metric, bound) for bound in (difference.low, difference.high))
        return f"{numbers.bare(metric, difference.value)}{numbers.unit(metric)} behind ({low} to {high}), one seed"
    return f"{difference.verdict} ({numbers.signed(metric, -difference.value)})"


def _seed_values(method: Mapping[str, Any]) -> list[float]:
    values = [number(run, "value") for run in mapping(method, "runs").values()]
    return [value for value in values if value is not None]


def costs(methods: Sequence[Mapping[str, Any]], chosen: str | None) -> Markup:
    """Return the table of costs: parameters, bytes, seconds and milliseconds of each method."""
    headings = [
        ("Method", ""), ("Trained parameters", "number"), ("Share", "number"),
        ("Adapter", "number"), ("Training", "number"),
        ("Peak memory", "number"), ("Latency, 1 row", "number"), ("Latency, 32 rows", "number"),
    ]  # fmt: skip
    retained = any("forgetting" in mapping(method, "cost") for method in methods)
    headings += [("Forgetting, points", "number")] if retained else []
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
            *([numbers.lost(number(cost, "forgetting"))] if retained else []),
        ]
        rows.append((_row_class(method, chosen), cells))
    return page.table("Cost of each method", headings, rows)


def other_metrics(methods: Sequence[Mapping[str, Any]], main: str, chosen: str | None) -> Markup | None:
    """Return the table of all metrics but the main one, or None if there are no others."""
    names = list(dict.fromkeys(name for method in methods for name in mapping(method, "metrics") if name != main))
    if not names:
        return None
    rows = [(_row_class(method, chosen), _name(method, chosen), mapping(method, "metrics")) for method in methods]
    return join([tag("h3", "Other metrics"), _figures("Other metrics of each method", "Method", names, rows)])


def by_set(sets: Mapping[str, Any]) -> Markup:
    """Return the table of metrics of each of several data sets."""
    names = list(dict.fromkeys(name for each in sets for name in mapping(sets, each)))
    rows = [("", each, mapping(sets, each)) for each in sets]
    return join([tag("h3", "Each data set"), _figures("Metrics of each data set", "Set", names, rows)])


def _figures(
    caption: str, first: str, names: Sequence[str], rows: Iterable[tuple[str, Any, Mapping[str, Any]]]
) -> Markup:
    """Return a table of metrics with intervals; each row has a class, a name, and values by metric."""
    filled = []
    for class_, head, metrics in rows:
        cells: list[Any] = [head]
        for name in names:
            figure = mapping(metrics, name)
            interval = tag("span", numbers.interval_of(name, figure), class_="tag")
            cells.append(join([numbers.bare(name, number(figure, "value")), interval]))
        filled.append((class_, cells))
    headings = [(first, ""), *((numbers.heading(name), "number") for name in names)]
    return page.table(caption, headings, filled, class_="few")


def differences(found: Sequence[verdicts.Difference], result: Mapping[str, Any], metric: str) -> Markup:
    """Return the table of differences between methods with their verdicts; empty if there are none."""
    if not found:
        return Markup()
    key = words(result, "metric")
    scale = scale_of([bound for d in found for bound in (d.low, d.value, d.high)], zero=True)
    rows = []
    for d in found:
        shown = d.verdict in ("better", "worse")
        limits = f"{numbers.signed(key, d.low)} to {numbers.signed(key, d.high)}"
        said = f"{d.a} against {d.b}: {numbers.signed(key, d.value)}{numbers.unit(key)}, interval {limits}"
        kind = "" if shown else "unshown"
        drawing = strip(scale, d.value, d.low, d.high, zero=True, kind=kind, said=said)
        verdict = f"{d.a} is {d.verdict}" if shown else "one seed: it may be reversed" if d.excludes_zero else d.verdict
        p = DASH if d.p is None else "< 0.001" if d.p < 0.001 else f"{d.p:.3f}"
        said_of = verdict if d.p_better is None or d.one_seed else join([verdict, _chance(d.p_better)])
        rows.append(
            (
                "shown" if shown else "unshown",
                [f"{d.a} against {d.b}", numbers.signed(key, d.value), limits, drawing, p, said_of],
            )
        )
    headings = [
        ("Pair", ""), (numbers.title(numbers.unit(key).strip()) or "Difference", "number"), ("Interval", "number"),
        ("Beside zero", ""), ("p", "number"), ("Verdict", "verdict"),
    ]  # fmt: skip
    level = _confidence(result)
    how = (
        f"{metric} in its own unit, seen so that more is better"
        if key in numbers.LESS_IS_BETTER
        else f"in{numbers.unit(key)} of {metric}"
    )
    shown_if = (
        "these intervals compare the models at hand, so with one seed no difference between methods counts as shown."
        if any(d.one_seed for d in found)
        else "a difference counts as shown only if its interval leaves zero out."
    )
    text = (
        f"Every pair on the same rows, {how}. {level}The intervals hold all at once, and p is adjusted for the number "
        f"of pairs: {shown_if}{_equality(result)}"
    )
    return page.section(
        "What the differences are worth",
        page.paragraph(" ".join(filter(None, [text, verdicts.seed_spread(result)]))),
        page.table("Paired differences", headings, rows, class_="pairs"),
    )


def _equality(result: Mapping[str, Any]) -> str:
    """Return what the last column means."""
    margin, key = number(result, "margin"), words(result, "metric")
    if margin is None:
        return ""
    said = f"{numbers.bare(key, margin)}{numbers.unit(key)}"
    return (
        f" Two methods are practically equal if the whole interval is nearer to zero than {said}. Below each verdict: "
        "the probability that the first is better, of that pair alone."
    )


def _chance(probability: float) -> Markup:
    return tag("span", f"probability {100 * probability:.0f}{numbers.THIN}%", class_="tag")


def _confidence(result: Mapping[str, Any]) -> str:
    confidence = number(result, "confidence")
    return "" if confidence is None else f"Confidence {100 * confidence:g} %. "
