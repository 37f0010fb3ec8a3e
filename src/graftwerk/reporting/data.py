"""Sections on the data that both pages share: held-out rows, their origin, issues found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup
from graftwerk.reporting.files import hint_of, mapping, mappings, number, words


def measured_on(measurement: Mapping[str, Any]) -> str:
    """``500 test rows``."""
    rows, split = number(measurement, "rows"), words(measurement, "split")
    if rows is None:
        return f"{split} rows" if split else "an unknown number of rows"
    return f"{rows:,.0f} {split} rows".replace("  ", " ")


def origin_facts(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return names and values that say where the rows come from, for a list of facts."""
    origin = mapping(data, "origin")
    rows = [f"{numbers.exact(number(value))} {name}" for name, value in mapping(data, "rows").items()]
    selected = ", ".join(f"{key} = {words(value)}" for key, value in mapping(origin, "filter").items())
    columns = ", ".join(f"{part} = {words(name)}" for part, name in mapping(origin, "columns").items())
    return [
        ("Training rows from", words(origin, "train")),
        ("Only rows with", selected),
        ("Columns", columns),
        ("Rows", ", ".join(rows)),
        ("Data fingerprint", words(data, "fingerprint")),
    ]


def findings_section(data: Mapping[str, Any]) -> Markup:
    """Return the section of issues with the data, or of their absence; empty if the files do not say."""
    found = mappings(data, "findings")
    if not found:
        if "findings" not in data:
            return Markup()
        text = "The checks (duplicates, leakage, label balance, cut texts, rows left out) found nothing."
        return page.section("The data", page.paragraph(text, class_="note"))
    said = []
    for finding in found:
        example = words(finding, "example")
        text = words(finding, "message") + (f" For example: {example}" if example else "")
        said.append(
            page.message("", text or words(finding, "code"), hint_of(finding), grave=finding.get("grave") is True)
        )
    return page.section("The data", page.messages(said))
