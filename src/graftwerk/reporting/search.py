"""The page of a search: the final comparison, what mattered, every trial, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.data import data_section, origin_facts
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import items, mapping, mappings, number, words
from graftwerk.reporting.interval_plot import scale_of, strip
from graftwerk.reporting.search_charts import (
    Setting,
    Trial,
    format_value,
    importance,
    parallel,
    settings_of,
    slices,
    trials_of,
)

COUNTED = {"pruned": "given up early", "infeasible": "too large for the memory", "fail": "failed"}
STATES = {"complete": "", "running": "not finished", **COUNTED}


def search_page(folder: Path, result: Mapping[str, Any]) -> str:
    """Return the page of a search as HTML."""
    metric = words(result, "metric") or "quality"
    trials, settings = trials_of(result, metric), settings_of(result)
    finished = words(result, "status") == "finished"
    sections = [_notes(result, finished), _last_word(result, metric), _finalists(result, metric)]
    sections += [_charts(result, trials, settings, metric), _trials(result, metric)]
    sections += [data_section(mapping(result, "data")), _how(result)]
    again = "The same command resumes a stopped search; a larger budget adds trials."
    sections.append(page.repeat(words(result, "command"), again))
    method = words(result, "method", "name") or "a method"
    return page.document(
        title=f"Search: {folder.name}",
        kicker=f"Search over the settings of {method} on {words(result, 'model') or 'a model'}",
        headline=_headline(result, finished),
        deck=[words(result, "text") if finished else "", _deck(result, metric, trials)],
        sections=[part for part in sections if part],
        footer=f"Written by graftwerk {words(result, 'graftwerk')} from search.json in {folder.name}.",
    )


def _headline(result: Mapping[str, Any], finished: bool) -> str:
    if not finished:
        return "The search is not finished"
    verdict = words(result, "difference", "verdict")
    return {
        "better": "The settings found beat the defaults",
        "worse": "The defaults stand",
        "no difference shown": "No difference shown from the defaults",
    }.get(verdict, "The defaults stand")


def _deck(result: Mapping[str, Any], metric: str, trials: list[Trial]) -> str:
    states = [words(trial, "state") for trial in mappings(result, "trials")]
    counts = [f"{states.count(state)} {text}" for state, text in COUNTED.items() if state in states]
    said = numbers.plural(len(states), "trial") + (f", of them {', '.join(counts)}" if counts else "")
    rows = number(result, "data", "rows", "validation")
    where = f", judged by {numbers.metric_name(metric)} on {rows:,.0f} validation rows" if rows else ""
    return f"{said}{where}." if trials or states else ""


def _notes(result: Mapping[str, Any], finished: bool) -> Markup:
    said = [page.message("Note:", note) for note in map(str, items(result, "notes"))]
    if not finished:
        text = "Some trials are still to do; the command at the end of this page resumes the search."
        said.insert(0, page.message("Not finished.", text, grave=True))
    return page.section("Before you read the results", page.messages(said)) if said else Markup()


def _last_word(result: Mapping[str, Any], metric: str) -> Markup:
    both = [("The settings found", mapping(result, "best")), ("The defaults", mapping(result, "default"))]
    if number(result, "best", "trial") is None:
        del both[0]  # the defaults stand, and are the best settings themselves
    figures = [(name, one, mapping(one, "metrics", metric)) for name, one in both]
    figures = [(name, one, figure) for name, one, figure in figures if number(figure, "value") is not None]
    if not figures:
        return Markup()
    bounds = [number(figure, part) for _, _, figure in figures for part in ("low", "value", "high")]
    scale = scale_of(bounds)
    rows = []
    for at, (name, one, figure) in enumerate(figures):
        value, low, high = (number(figure, part) for part in ("value", "low", "high"))
        assert value is not None
        said = f"{name}: {numbers.value_of(metric, value)}, interval {numbers.interval_of(metric, figure)}"
        drawing = strip(scale, value, low, high, kind="" if at else "recommended", said=said)
        chosen = ", ".join(
            f"{key.rpartition('.')[2]} {format_value(one_)}" for key, one_ in mapping(one, "settings").items()
        )
        cells = [name, numbers.bare(metric, value), numbers.interval_of(metric, figure), drawing, chosen]
        rows.append(("" if at else "recommended", cells))
    headings = [
        ("", ""), (numbers.heading(metric), "number"), ("Interval", "number"), ("", ""), ("Settings", "words"),
    ]  # fmt: skip
    seeds = len(items(result, "seeds"))
    rows_said = f"{number(result, 'rows') or 0:,.0f} {words(result, 'split')} rows"
    text = (
        f"On {rows_said} that no trial has seen, mean of {seeds} fresh seeds. These are the figures to report: the "
        "best of many trials flatters itself on the rows that chose it."
    )
    return page.section("Final comparison", page.paragraph(text), page.table("Final comparison", headings, rows))


def _finalists(result: Mapping[str, Any], metric: str) -> Markup:
    rows = []
    for one in mappings(result, "finalists"):
        values = [number(value) for value in mapping(one, "validation").values()]
        each = ", ".join(numbers.bare(metric, value) for value in values) or DASH
        failed = "; ".join(f"seed {seed}: {words(why)}" for seed, why in mapping(one, "failed").items())
        chosen = one.get("chosen") is True
        cells = [
            words(one, "name"),
            numbers.bare(metric, number(one, "mean")),
            each,
            failed or ("chosen" if chosen else ""),
        ]
        rows.append(("recommended" if chosen else "", cells))
    if not rows:
        return Markup()
    headings = [
        ("Settings of", ""), (numbers.heading(metric), "number"), ("Each fresh seed", "number"), ("", "words"),
    ]  # fmt: skip
    text = (
        "The best trials, trained again with fresh seeds; the one with the best mean on the validation rows is chosen."
    )
    return page.section("The finalists", page.paragraph(text), page.table("The finalists", headings, rows))


def _charts(result: Mapping[str, Any], trials: list[Trial], settings: list[Setting], metric: str) -> Markup:
    if len(trials) < 2 or not settings:
        return Markup()
    parts: list[Any] = []
    shares = [
        (key.rpartition(".")[2], share)
        for key, value in mapping(result, "importance").items()
        if (share := number({"value": value}, "value")) is not None and 0 <= share <= 1
    ]
    if shares:
        caption = "The share of each setting in what makes a trial one of the best (PED-ANOVA); rough with few trials."
        parts.append(page.figure(importance(shares), caption))
    less = metric in numbers.LESS_IS_BETTER
    caption = join(
        [
            "Every trial as a line from its settings to its value: ",
            tag("span", class_="key recommended"), "chosen  ", tag("span", class_="key on-front"), "the better half  ",
            tag("span", class_="key"), "the rest.",
        ]
    )  # fmt: skip
    parts.append(page.figure(parallel(trials, settings, metric, less), caption))
    parts += [page.figure(slices(trials, setting, metric)) for setting in settings]
    return page.section("What mattered", *parts)


def _trials(result: Mapping[str, Any], metric: str) -> Markup:
    keys = [words(axis, "key") for axis in mappings(result, "space")]
    less, best = metric in numbers.LESS_IS_BETTER, number(result, "best", "trial")
    listed = mappings(result, "trials")
    listed.sort(key=lambda one: ((value := number(one, "value")) is None, (value or 0.0) * (1 if less else -1)))
    rows = []
    for trial in listed:
        settings = mapping(trial, "settings")
        state = words(trial, "state")
        value = number(trial, "value")
        said = numbers.bare(metric, value) if value is not None else STATES.get(state, state)
        cells = [words(trial, "number"), said, numbers.seconds(number(trial, "seconds"))]
        cells += [format_value(settings[key]) if key in settings else DASH for key in keys]
        rows.append(("recommended" if number(trial, "number") == best is not None else "", cells))
    if not rows:
        return Markup()
    headings = [("Trial", ""), (numbers.heading(metric), "number"), ("Time", "number")]
    headings += [(key.rpartition(".")[2], "number") for key in keys]
    reasons = [
        page.message(
            f"Trial {words(trial, 'number')} {STATES.get(words(trial, 'state'), 'failed')}:", words(trial, "reason")
        )
        for trial in listed
        if words(trial, "reason")
    ]
    summary = tag("summary", f"All {numbers.plural(len(rows), 'trial')}, the best on the validation rows first")
    content = [tag("details", summary, page.table("Every trial", headings, rows))]
    return page.section("Every trial", *content, page.messages(reasons) if reasons else Markup())


def _how(result: Mapping[str, Any]) -> Markup:
    budget = mapping(result, "budget")
    training = mapping(result, "training")
    rows: list[tuple[str, Any]] = [
        ("Model", words(result, "model")),
        ("Task", words(result, "task")),
        ("Method", numbers.settings({**mapping(result, "method"), "name": None})),
        ("Sampler", words(budget, "sampler")),
        ("Pruning", words(budget, "pruner")),
        ("Trials", words(budget, "trials") or str(len(mappings(result, "trials")))),
        ("Seconds", words(budget, "seconds")),
        ("Trials at once", words(budget, "workers")),
        ("Fresh seeds", words(result, "seeds")),
        *origin_facts(mapping(result, "data")),
        ("Rows a step", words(training, "per_device_train_batch_size")),
        ("Machine", ", ".join(f"{key} {words(result, 'machine', key)}" for key in mapping(result, "machine"))),
    ]
    axes = [
        (words(axis, "key"), ", ".join(map(format_value, items(axis, "choices"))) or _range(axis))
        for axis in mappings(result, "space")
    ]
    return page.section("How it was searched", page.facts(rows), tag("h3", "The space"), page.facts(axes))


def _range(axis: Mapping[str, Any]) -> str:
    log = ", logarithmic" if axis.get("log") is True else ""
    return f"{numbers.plain(number(axis, 'low'))} to {numbers.plain(number(axis, 'high'))}{log}"
