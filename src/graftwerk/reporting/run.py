"""The page of a run: what it reached, how it learnt, what was said on the way, what it cost, how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.reporting import numbers, page, tables
from graftwerk.reporting.data import data_section, measured_on, origin_facts
from graftwerk.reporting.escape import Markup, tag
from graftwerk.reporting.files import at, hint_of, mapping, mappings, number, words
from graftwerk.reporting.line_charts import Chart, Curve, Mark, charts
from graftwerk.reporting.mistakes import mistakes_section
from graftwerk.reporting.retained import retained_section

SAID = {
    "diagnosis": "Diagnosis",
    "bad_step": "Step skipped",
    "memory": "Memory",
    "early_stopping": "Stopped early",
    "warning": "Warning",
    "resume": "Resumed",
}
"""Kinds of events that are messages, and how they are introduced."""
GRAVE = frozenset({"diagnosis", "bad_step"})
MOST_MESSAGES = 40


def run_page(
    folder: Path,
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    analysis: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    broken: int,
    config: str,
    confidence: float | None,
    explained: Sequence[Markup] = (),
) -> str:
    """Return the page of a run as HTML.

    Args:
        folder: The run folder.
        manifest: Contents of `manifest.json`.
        evaluation: Contents of `evaluation.json`, or empty.
        analysis: Contents of `predictions/analysis.json`, or empty.
        events: The events of `metrics.jsonl`.
        broken: Number of its lines that could not be read.
        config: Text of `config.yaml`.
        confidence: Level of the intervals, or None if unknown.
        explained: Sections on what the adapter did, if that was asked.
    """
    split, figures, rows = _figures(manifest)
    sections = [
        _state(folder, manifest, events, broken),
        _metrics(manifest, confidence),
        retained_section(mapping(manifest, "retained")),
        _examples(manifest, evaluation),
        mistakes_section(manifest, analysis),
        *explained,
        _learning(manifest, events),
        _messages(events),
        data_section(mapping(manifest, "data")),
        _cost(manifest, evaluation),
        _setting(manifest),
        _config(config),
        page.repeat(words(manifest, "command")),
    ]
    known = mapping(manifest, "versions")
    versions = ", ".join(f"{name} {words(known, name)}" for name in known)
    footer = f"Written by graftwerk {words(manifest, 'graftwerk')} from the files in {folder.name}. {versions}".strip()
    return page.document(
        title=f"Run: {folder.name}",
        kicker=f"{words(manifest, 'method', 'name') or 'A run'} on {words(manifest, 'model') or 'a model'}",
        headline=page.prose(_headline(manifest, split, figures)),
        deck=[_deck(manifest, figures, rows, split, confidence)],
        sections=[part for part in sections if part],
        footer=footer,
    )


def _figures(manifest: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], float | None]:
    """Return the split that counts (test before validation), its metrics, and its rows."""
    for split in ("test", "validation"):
        if found := mapping(manifest, "metrics", split):
            return split, found, number(manifest, "data", "rows", split)
    return "", {}, None


def _main_metric(manifest: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    chosen = words(manifest, "best", "metric")
    return chosen if chosen in figures else next(iter(figures), "")


def _headline(manifest: Mapping[str, Any], split: str, figures: Mapping[str, Any]) -> str:
    method = words(manifest, "method", "name") or "The run"
    status = words(manifest, "status")
    metric = _main_metric(manifest, figures)
    value = number(figures, metric, "value") if metric else None
    if mapping(manifest, "chance", split).get("at_chance") is True:
        return f"{method} is not shown to be better than {words(manifest, 'chance', split, 'guess')}"
    if value is not None:
        return f"{method} reaches {numbers.value_of(metric, value)} {numbers.metric_name(metric)} on {split} rows"
    return {
        "finished": f"{method} is trained, and no rows were held out to say how well",
        "running": f"{method} is still training, or its process died without a word",
        "interrupted": f"{method} was interrupted before it was measured",
        "diverged": f"{method} diverged: there is no result",
        "trial": f"{method} was tried, and has no metrics",
    }.get(status, f"{method} has no result")


def _deck(
    manifest: Mapping[str, Any], figures: Mapping[str, Any], rows: float | None, split: str, confidence: float | None
) -> str:
    metric = _main_metric(manifest, figures)
    said = []
    figure = mapping(figures, metric) if metric else {}
    if number(figure, "low") is not None:
        level = f"{100 * confidence:g}{numbers.THIN}% interval" if confidence else "Interval"
        said.append(f"{level} {numbers.interval_of(metric, figure)} on {measured_on({'rows': rows, 'split': split})}.")
    trained, share = number(manifest, "parameters", "trained"), number(manifest, "parameters", "share")
    seconds = number(manifest, "cost", "training_seconds")
    if trained is not None:
        time = f" in {numbers.seconds(seconds)}" if seconds is not None else ""
        said.append(f"It trained {numbers.exact(trained)} parameters, {numbers.share(share)} of the model{time}.")
    return " ".join(said)


def _state(folder: Path, manifest: Mapping[str, Any], events: Sequence[Mapping[str, Any]], broken: int) -> Markup:
    """Return the section of errors and notes to read before the results."""
    said = []
    status, error = words(manifest, "status"), mapping(manifest, "error")
    if status == "trial":
        kept = "graftwerk train config.yaml --resume measures them"  # unless a search has removed the checkpoints
        hint = kept if (folder / "checkpoints").is_dir() else "train again with these settings to measure them"
        said.append(page.message("A trial:", "its settings were not chosen; the test rows are not measured", hint))
    elif status != "finished":
        unknown = "The files say that it is still training." if status == "running" else "There is no reason stored."
        what = words(error, "what") or unknown
        where, kept = words(error, "where"), (words(error, "recovered") or words(error, "kept"))
        text = what + (f" ({where})" if where else "") + (f" Recovered: {kept}." if kept else "")
        said.append(page.message(f"{numbers.title(status or 'unknown status')}:", text, hint_of(error), grave=True))
    metrics = mapping(manifest, "metrics")
    for split in ("test", "validation"):
        if text := words(manifest, "chance", split, "text"):
            at_chance = at(manifest, "chance", split, "at_chance") is True
            lead = f"{'At chance level' if at_chance else 'Note'}, {split} rows:"
            said.append(page.message(lead, text, hint_of(mapping(manifest, "chance", split)), grave=at_chance))
    if status == "finished" and "test" not in metrics:
        if "validation" in metrics:
            text = "the validation rows that chose the checkpoint also make these metrics, which are a little too good"
            said.append(page.message("No test rows:", text, "data.test holds out rows of their own"))
        else:
            said.append(
                page.message(
                    "No rows were held out:", "nothing says how good this is", "data.validation, data.test", grave=True
                )
            )
    if broken:
        text = f"left out, because they cannot be read: {numbers.plural(broken, 'line')} of metrics.jsonl"
        said.append(page.message("Note:", text))
    if not events:
        said.append(page.message("Note:", "there is no metrics.jsonl, or it is empty: no curves can be drawn"))
    return page.section("Before you read the results", page.messages(said)) if said else Markup()


def _metrics(manifest: Mapping[str, Any], confidence: float | None) -> Markup:
    parts: list[Any] = []
    for split in ("test", "validation"):
        figures = mapping(manifest, "metrics", split)
        if not figures:
            continue
        shown, notes = [], []
        for name, figure in figures.items():
            value = number(figure, "value")
            remark = numbers.interval_of(name, figure) if number(figure, "low") is not None else "no interval"
            if (base := number(manifest, "baseline", split, name, "value")) is not None:
                remark += f"; the base alone: {numbers.value_of(name, base)}"
            shown.append((numbers.title(numbers.metric_name(name)), numbers.value_of(name, value), remark))
            if signature := words(figure, "signature"):
                notes.append(page.paragraph(f"{numbers.title(numbers.metric_name(name))}: {signature}", class_="note"))
            if note := words(figure, "note"):
                notes.append(page.paragraph(f"{numbers.title(numbers.metric_name(name))}: {note}.", class_="note"))
        rows = number(manifest, "data", "rows", split)
        parts += [tag("h3", f"On {measured_on({'rows': rows, 'split': split})}"), page.big_figures(shown), *notes]
        parts += _against_guess(mapping(manifest, "chance", split))
        if sets := mapping(manifest, "metrics_by_set", split):
            parts.append(tables.by_set(sets))
    if not parts:
        return Markup()
    level = f"{100 * confidence:g} % intervals" if confidence else "Intervals"
    text = (
        "by bootstrap over rows: how far a metric would move with other rows of the same kind, not with another seed."
    )
    return page.section("How good it is", *parts, page.paragraph(f"{level}, {text}", class_="note"))


def _against_guess(chance: Mapping[str, Any]) -> list[Markup]:
    """Return a sentence on how much better the run is than a guess, if it is shown to be."""
    metric, difference = words(chance, "metric"), mapping(chance, "difference")
    value, low, high = (number(difference, part) for part in ("value", "low", "high"))
    if value is None or low is None or high is None or chance.get("at_chance") is not False or "text" in chance:
        return []
    guess = f"{words(chance, 'guess')} ({numbers.value_of(metric, number(chance, 'guess_value'))})"
    apart = f"{numbers.bare(metric, value)}{numbers.unit(metric)}"
    text = f"{numbers.title(numbers.metric_name(metric))}: better than {guess} by {apart}"
    limits = f"{numbers.bare(metric, low)} to {numbers.bare(metric, high)}"
    return [page.paragraph(page.prose(f"{text} ({limits})."), class_="note")]


def _examples(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Markup:
    """Return answers that the model wrote, for tasks that write: of evenly spaced rows, so that nobody chose them."""
    shown = mappings(evaluation, "examples") or mappings(manifest, "examples")
    if not shown:
        return Markup()
    parts: list[Any] = []
    for example in shown:
        rows = [
            (name, words(example, part))
            for name, part in (
                ("Source", "source"), ("Right", "reference"),
                ("The base alone", "before"), ("With the adapter", "after"),
            )
            if example.get(part) is not None
        ]  # fmt: skip
        parts.append(page.facts([(name, text or "(nothing)") for name, text in rows]))
    return page.section("What it writes", *parts)


def _learning(manifest: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Markup:
    steps = [event for event in events if event.get("kind") == "step"]
    evaluations = [event for event in events if event.get("kind") == "evaluation"]
    if not steps and not evaluations:
        return Markup()
    start = next((event for event in events if event.get("kind") == "start"), {})
    ends = [number(event, "step") or 0.0 for event in (*steps, *evaluations)]
    total = max([number(start, "total_steps") or 0.0, *ends])
    losses = [Curve("training loss", "train", _series(steps, "loss"))]
    if evaluations:
        losses.append(Curve("validation loss", "validation", _series(evaluations, "loss")))
    rate = Curve("learning rate", "rate", _series(steps, "learning_rate"))
    wanted = [Chart(losses, "Loss", numbers.plain, least=0.02)]
    validation = _validation(manifest, evaluations, total)
    if validation is not None:
        wanted.append(validation)
    wanted.append(Chart([rate], "Learning rate", numbers.plain, height=150, zero=True))
    loss, *others = charts(wanted, steps=total)
    missing = None
    if validation is None and not (evaluations and words(manifest, "best", "metric") == "loss"):
        why = (
            "The validation metric is not stored."
            if evaluations
            else "No validation rows, or no evaluation yet: there is no validation curve."
        )
        missing = page.paragraph(why, class_="missing")
    return page.section("How it learnt", page.figure(loss, _gaps(steps)), missing, *map(page.figure, others))


def _validation(manifest: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], total: float) -> Chart | None:
    """Return the chart of the metric that selected the checkpoint, or None if it was not measured or is the loss."""
    known = [name for name in evaluations[0] if name in numbers.METRICS] if evaluations else []
    metric = words(manifest, "best", "metric") or next(iter(known), "")
    if metric == "loss":
        return None  # drawn beside the training loss
    if not metric or not any(number(event, metric) is not None for event in evaluations):
        return None
    step, value = number(manifest, "best", "step"), number(manifest, "best", "value")
    marks = (
        [Mark(step, value, f"saved: step {step:,.0f}")]
        if step is not None and value is not None and step <= total
        else []
    )
    name = numbers.metric_name(metric)
    points = _series(evaluations, metric)
    if metric not in numbers.NO_SHARES and all(value is None or 0 <= value <= 1 for _, value in points):
        return Chart(
            [Curve(name, "metric", points)], f"Validation {name}, %", numbers.percent,
            tick=lambda value: f"{100 * value:.3g}", least=0.02, marks=marks,
        )  # fmt: skip
    return Chart([Curve(name, "metric", points)], f"Validation {name}", numbers.plain, marks=marks)


def _series(events: Sequence[Mapping[str, Any]], figure: str) -> list[tuple[float, float | None]]:
    found = [
        (step, number(event, figure)) for event in events if (step := number(event, "step")) is not None and step >= 0
    ]
    return sorted(found, key=lambda point: point[0])


def _gaps(steps: Sequence[Mapping[str, Any]]) -> str | None:
    gaps = sum(number(event, "loss") is None for event in steps)
    counted = numbers.plural(gaps, "logged loss", "logged losses")
    return f"{counted} had no finite value; the line has a gap there." if gaps else None


def _messages(events: Sequence[Mapping[str, Any]]) -> Markup:
    said: list[Markup] = []
    more = 0
    for event in events:
        kind = words(event, "kind")
        if kind not in SAID or event.get("code") == "at_chance":  # that one opens the page
            continue
        if len(said) == MOST_MESSAGES:
            more += 1
            continue
        step = number(event, "step")
        text = (
            words(event, "text")
            or words(event, "message")
            or (f"from {words(event, 'path')}" if kind == "resume" else "no text is stored")
        )
        lead = f"{SAID[kind]}, step {step:,.0f}:" if step is not None else f"{SAID[kind]}:"
        said.append(page.message(lead, text, hint_of(event), grave=kind in GRAVE))
    if not said:
        return Markup()
    rest = page.paragraph(f"{more:,} more are in metrics.jsonl.", class_="note") if more else None
    return page.section("What was said on the way", page.messages(said), rest)


def _cost(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Markup:
    cost, parameters = mapping(manifest, "cost"), mapping(manifest, "parameters")
    measured = mapping(evaluation, "cost")
    size = number(measured, "adapter_bytes") or number(cost, "adapter_bytes")
    shown: list[tuple[str, Any, Any]] = []
    if (trained := number(parameters, "trained")) is not None:
        head = number(parameters, "head")
        remark = f"{numbers.share(number(parameters, 'share'))} of {numbers.count(number(parameters, 'total'))}"
        shown.append(
            (
                "Trained parameters",
                numbers.count(trained),
                remark + (f"; {numbers.exact(head)} in the head" if head else ""),
            )
        )
    if (seconds := number(cost, "training_seconds")) is not None:
        steps = number(cost, "steps")
        remark = "" if steps is None else f"{steps:,.0f} steps" + _planned(cost, "step_seconds", numbers.seconds)
        shown.append(("Training", numbers.seconds(seconds), remark))
    if (peak := number(cost, "peak_memory_bytes")) is not None:
        together = number(cost, "processes") or 1
        remark = "while training" + (f", {together:,.0f} processes together" if together > 1 else "")
        remark += _planned(cost, "peak_memory_bytes", numbers.byte_size, measured=False)
        shown.append(("Peak memory", numbers.byte_size(peak), remark))
    if size is not None:
        shown.append(("Adapter", numbers.byte_size(size), "on disk"))
    for batch in ("1", "32"):
        if (latency := number(measured, f"latency_ms_batch_{batch}")) is not None:
            remark = "one row at a time" if batch == "1" else f"{batch} rows at once"
            shown.append(("Latency a row", numbers.milliseconds(latency), remark))
    if not shown:
        return Markup()
    known = (("training time", cost.get("training_seconds")), ("adapter size", size))
    missing = [name for name, value in known if value is None]
    note = page.paragraph(f"Not measured: {numbers.listed(missing)}.", class_="missing") if missing else None
    return page.section("What it cost", page.big_figures(shown), note)


def _planned(cost: Mapping[str, Any], key: str, text: Callable[[float | None], str], *, measured: bool = True) -> str:
    """Return what was planned for a cost, behind what was measured, or "" if nothing was planned."""
    if (planned := number(cost, f"planned_{key}")) is None:
        return ""
    return f"; {text(number(cost, key))} each, planned {text(planned)}" if measured else f"; planned {text(planned)}"


def _setting(manifest: Mapping[str, Any]) -> Markup:
    return page.section(
        "What was trained",
        page.facts(
            [
                ("Method", words(manifest, "method", "name")),
                ("Its settings", numbers.settings(mapping(manifest, "method"))),
                ("Model", words(manifest, "model")),
                ("Base fingerprint", words(manifest, "base_fingerprint")),
                ("Task", words(manifest, "task")),
                ("Labels", words(manifest, "labels")),
                *origin_facts(mapping(manifest, "data")),
                ("Longest input", f"{words(manifest, 'max_length')} tokens" if words(manifest, "max_length") else ""),
                ("Seed", words(manifest, "seed")),
            ]
        ),
    )


def _config(config: str) -> Markup:
    if not config.strip():
        return page.section("The run file", page.paragraph("There is no config.yaml.", class_="missing"))
    return page.section(
        "The run file", tag("details", tag("summary", "Every setting, defaults included"), page.command(config))
    )
