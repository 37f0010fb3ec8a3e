"""The section on what a run gets wrong: confusions, metrics of each label, calibration, residuals, the worst rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.calibration import reliability, scatter
from graftwerk.reporting.data import measured_on
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import at, items, mapping, mappings, number, words
from graftwerk.reporting.labels import cut

SHADES = 5
LONGEST_NAME = 24
TEXTS = ("text", "text_pair", "anchor", "positive", "source")
UPRIGHT = 5
"""With more classes their names stand upright above the columns."""
OPEN = 30
"""Tables with more rows are folded."""
FIRST = 5
"""So many of the worst rows are seen at once."""
CONFUSABLE = 25
"""A matrix with more classes is not drawn; our files have at most twelve."""


def mistakes_section(manifest: Mapping[str, Any], analysis: Mapping[str, Any]) -> Markup:
    """Return the section on errors; empty for a run that keeps no predictions.

    Args:
        manifest: Contents of `manifest.json`.
        analysis: Contents of `predictions/analysis.json`, or empty.
    """
    split = next((name for name in ("test", "validation") if mapping(analysis, "splits", name)), None)
    if split is None:
        return Markup()
    known = mapping(analysis, "splits", split)
    rows, wrong = number(known, "rows"), number(known, "wrong")
    on = measured_on({"rows": rows, "split": split})
    said = f"On {on}." if wrong is None else f"{numbers.exact(wrong)} of {on} are answered wrongly."
    parts = [
        _confusion(mapping(known, "confusion")),
        _confusions(known),
        _by_label(mappings(known, "by_label"), str(manifest.get("task"))),
        _by_length(known),
        _calibration(mapping(known, "calibration")),
        _residuals(mapping(known, "residuals")),
        _worst(known),
    ]
    if not any(parts):
        return Markup()
    return page.section("What it gets wrong", page.paragraph(said), *filter(None, parts))


def _confusion(confusion: Mapping[str, Any]) -> Markup:
    names = [words(name) for name in items(confusion, "labels")]
    counts = items(confusion, "counts")
    square = all(isinstance(row, list) and len(row) == len(names) for row in counts) and len(counts) == len(names)
    if not names or not square or len(names) > CONFUSABLE:
        return Markup()
    rows = []
    for true, (name, row) in enumerate(zip(names, counts, strict=True)):
        values = [number({"at": value}, "at") or 0.0 for value in row]
        total = sum(values)
        cells = [_shaded(value, total, wrong=true != column) for column, value in enumerate(values)]
        rows.append(("", [page.breakable(cut(name, LONGEST_NAME)), *cells]))
    headings = [
        ("Right \N{DOWNWARDS ARROW}, predicted \N{RIGHTWARDS ARROW}", ""),
        *((cut(n, LONGEST_NAME), "number") for n in names),
    ]
    return join(
        [
            tag("h3", "Confusion matrix"),
            page.table(
                "Confusion matrix", headings, rows, class_="confusion many" if len(names) > UPRIGHT else "confusion"
            ),
            page.paragraph(
                "Rows of each label by the answer; the darker, the larger its share of the label.", class_="note"
            ),
        ]
    )


def _shaded(value: float, total: float, *, wrong: bool) -> Markup:
    share = min(max(value / total, 0.0), 1.0) if total > 0 else 0.0
    shade = 0 if value <= 0 else 1 + min(int(share * SHADES), SHADES - 1)
    return tag("span", numbers.exact(value), class_=f"heat {'wrong' if wrong else 'right'} heat-{shade}")


def _confusions(known: Mapping[str, Any]) -> Markup:
    found = mappings(known, "confusions")
    if not found:
        return Markup()
    rows = [
        (
            "",
            [
                page.breakable(words(one, "true")),
                page.breakable(words(one, "predicted")),
                numbers.exact(number(one, "rows")),
            ],
        )
        for one in found
    ]
    all_pairs = number(known, "confused_pairs") or len(found)
    note = (
        f"The {len(found):,} most frequent of {numbers.exact(all_pairs)} pairs of labels."
        if all_pairs > len(found)
        else None
    )
    return join(
        [
            tag("h3", "What is taken for what"),
            page.table("Confusions", [("Right", ""), ("Predicted", ""), ("Rows", "number")], rows, class_="few"),
            page.paragraph(note, class_="note") if note else "",
        ]
    )


def _by_length(known: Mapping[str, Any]) -> Markup:
    """Return the table of errors by the length of a row, or nothing if the files do not have it."""
    slices = mappings(known, "by_length")
    if not slices:
        return Markup()
    judged = all(number(each, "right") is not None for each in slices)
    rows = []
    for each in slices:
        low, high = (numbers.exact(number(each, part)) for part in ("from", "to"))
        cells = [low if low == high else f"{low} to {high}", numbers.exact(number(each, "rows"))]
        if judged:
            share, least, most = (number(each, part) or 0.0 for part in ("right", "low", "high"))
            cells += [numbers.bare_percent(share), f"{numbers.bare_percent(least)} to {numbers.bare_percent(most)}"]
        else:
            cells.append(numbers.plain(number(each, "error") or 0.0))
        rows.append(("", cells))
    more = (
        [("Right, %", "number"), ("Interval", "number")]
        if judged
        else [(numbers.title(words(known, "error")), "number")]
    )
    table = page.table("Short and long rows", [("Tokens", "number"), ("Rows", "number"), *more], rows)
    return join([tag("h3", "Short and long rows"), table])


def _by_label(found: Sequence[Mapping[str, Any]], task: str) -> Markup:
    if not found:
        return Markup()
    what = "entity type" if task == "token-classification" else "label"
    counted = "Entities" if task == "token-classification" else "Rows"
    with_threshold = any(number(one, "threshold") is not None for one in found)
    rows = []
    for one in found:
        shares = [numbers.bare_percent(number(one, part)) for part in ("f1", "precision", "recall")]
        counts = [numbers.exact(number(one, part)) for part in ("rows", "predicted")]
        threshold = [numbers.plain(number(one, "threshold"))] if with_threshold else []
        rows.append(("", [page.breakable(words(one, "label")), *shares, *counts, *threshold]))
    headings = [
        (numbers.title(what), ""), ("F1, %", "number"), ("Precision, %", "number"), ("Recall, %", "number"),
        (counted, "number"), ("Predicted", "number"), *([("Threshold", "number")] if with_threshold else []),
    ]  # fmt: skip
    table = page.table(f"Metrics of each {what}", headings, rows)
    return join(
        [
            tag("h3", f"Each {what}"),
            table if len(rows) <= OPEN else tag("details", tag("summary", numbers.plural(len(rows), what)), table),
        ]
    )


def _calibration(calibration: Mapping[str, Any]) -> Markup:
    drawing = reliability(calibration)
    if not drawing:
        return Markup()
    error = number(calibration, "expected_calibration_error")
    caption = (
        f"Expected calibration error {numbers.percent(error)} over {numbers.exact(number(calibration, 'answers'))} "
        "answers in ten bins, with 95 % intervals. On the dotted line answers are right as often as the model says; "
        "below it the model is too sure of itself."
    )
    return join([tag("h3", "Calibration"), page.figure(drawing, caption)])


def _residuals(residuals: Mapping[str, Any]) -> Markup:
    drawing = scatter(residuals)
    if not drawing:
        return Markup()
    quantiles = mapping(residuals, "quantiles")
    mean, deviation = _short(number(residuals, "mean")), _short(number(residuals, "deviation"))
    shown = [
        ("Mean", mean, "above zero: answers are too high"),
        ("Standard deviation", deviation, ""),
        ("Median", _short(number(quantiles, "50")), ""),
        ("Nine of ten rows", f"{_short(number(quantiles, '5'))} to {_short(number(quantiles, '95'))}", ""),
    ]
    caption = f"Predicted less right number, {numbers.plural(len(items(residuals, 'points')), 'row')}."
    return join([tag("h3", "Residuals"), page.big_figures(shown), page.figure(drawing, caption)])


def _short(value: float | None) -> str:
    """Format a number of any size with three significant digits."""
    return numbers.bare("rmse", value)


def _worst(known: Mapping[str, Any]) -> Markup:
    found = mappings(known, "worst")
    if not found:
        return Markup()
    error = words(known, "error") or "error"
    entries = []
    for one in found:
        facts = [
            *((numbers.title(part.replace("_", " ")), words(one, part)) for part in TEXTS if part in one),
            ("Right", _answer(one, "true")) if "true" in one else ("", ""),
            ("Predicted", _answer(one, "predicted") + _sure(one)) if "predicted" in one else ("", ""),
            (numbers.title(error), numbers.plain(number(one, "error"))),
            ("Row", words(one, "where") or words(one, "row")),
        ]
        entries.append(tag("li", page.facts(facts)))
    text = "The largest errors first; texts are cut. `graftwerk errors` filters all of them."
    parts = [tag("h3", "The worst rows"), page.paragraph(page.prose(text), class_="note")]
    parts.append(tag("ul", *entries[:FIRST], class_="worst"))
    if more := entries[FIRST:]:
        parts.append(tag("details", tag("summary", f"{len(more)} more"), tag("ul", *more, class_="worst")))
    return join(parts)


def _sure(one: Mapping[str, Any]) -> str:
    confidence = number(one, "confidence")
    if confidence is None:
        return ""
    lead = "its surest mistake " if isinstance(one.get("predicted"), list) else ""
    return f" ({lead}{numbers.percent(confidence)})"


def _answer(one: Mapping[str, Any], side: str) -> str:
    """Return a side's answer in words; of entities, only those that the other side lacks."""
    value = at(one, side)
    if isinstance(value, float):
        return numbers.plain(number(one, side))
    if isinstance(value, list):
        other = [_place(each) for each in items(one, "predicted" if side == "true" else "true")]
        listed = [each for each in value if not isinstance(each, Mapping) or _place(each) not in other]
        named = [
            f"{words(each, 'label')}: {words(each, 'text')}" if isinstance(each, Mapping) else words(each)
            for each in listed
        ]
        return "; ".join(named) or DASH
    return words(one, side) or "(nothing)"


def _place(entity: Any) -> tuple[str, ...]:
    return (words(entity, "start"), words(entity, "end"), words(entity, "label"))
