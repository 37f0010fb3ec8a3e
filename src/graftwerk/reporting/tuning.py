"""Section on how each method of a comparison found its settings: what it tried, how good it was, what it spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import mapping, mappings, number, words


def tuning_section(result: Mapping[str, Any]) -> Markup:
    """Return the section, empty if nothing was tuned."""
    tuning = mappings(result, "tuning")
    if not tuning:
        return Markup()
    key, budget = words(result, "metric"), mapping(result, "budget")
    text = (
        "Every line was trained and measured on validation rows; the one that is marked stands for its method and was "
        "then measured on the rows of the result."
    )
    headings = [
        ("Method", ""), ("Tried", ""), (f"Validation {numbers.heading(key)}", "number"), ("Failed", "number"),
    ]  # fmt: skip
    rows = []
    for each in tuning:
        for one in mappings(each, "tried"):
            chosen = words(one, "name") == words(each, "chosen")
            settings = ", ".join(
                f"{name.rpartition('.')[2]} {words(mapping(one, 'changes'), name)}"
                for name in mapping(one, "changes")
                if name.startswith(("training.", "method."))
            )
            failed = len(mapping(one, "failed"))
            name = join([settings, tag("span", "chosen", class_="tag")]) if chosen else settings
            value = number(one, "value")
            cells = [
                words(each, "method"), name, DASH if value is None else numbers.bare(key, value), str(failed or DASH),
            ]  # fmt: skip
            rows.append(("recommended" if chosen else "", cells))
    return page.section(
        "How the settings were found",
        page.paragraph(f"{text} {_budget(budget)}".strip()),
        page.table("What each method tried", headings, rows),
        _spent(budget),
    )


def _budget(budget: Mapping[str, Any]) -> str:
    if not budget:
        return ""
    trials, seconds = number(budget, "trials"), number(budget, "seconds")
    given = (
        f"{numbers.seconds(seconds)} of training" if seconds is not None else numbers.plural(int(trials or 0), "trial")
    )
    return f"Each could spend {given}, with seed {words(budget, 'seed')}, which no result has."


def _spent(budget: Mapping[str, Any]) -> Markup:
    spent = mapping(budget, "spent")
    if not spent:
        return Markup()
    rows = [
        (
            "",
            [
                name,
                numbers.exact(number(spent, name, "trials")),
                numbers.seconds(number(spent, name, "seconds")),
                numbers.exact(number(spent, name, "failed")),
            ],
        )
        for name in spent
    ]
    headings = [("Method", ""), ("Trials", "number"), ("Training", "number"), ("Failed", "number")]
    return join([tag("h3", "What each method spent"), page.table("What each method spent", headings, rows)])
