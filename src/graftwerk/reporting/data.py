"""Sections on the data that both pages share: held-out rows, their origin, issues found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup, tag
from graftwerk.reporting.files import hint_of, mapping, mappings, number, words

FOLDED = 12
"""More labels than these are shown on request."""


def measured_on(measurement: Mapping[str, Any]) -> str:
    """Return ``500 test rows``."""
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


def data_section(data: Mapping[str, Any]) -> Markup:
    """Return the section on the rows: issues, lengths and labels; empty if the files do not say."""
    found = mappings(data, "findings")
    said: list[Markup] = []
    for finding in found:
        example = words(finding, "example")
        text = words(finding, "message") + (f" For example: {example}" if example else "")
        said.append(
            page.message("", text or words(finding, "code"), hint_of(finding), grave=finding.get("grave") is True)
        )
    parts = [page.messages(said)] if said else []
    if not found and "findings" in data:
        text = "The checks (duplicates, leakage, label balance, cut texts, rows left out) found nothing."
        parts.append(page.paragraph(text, class_="note"))
    summary = mapping(data, "summary")
    parts += [_lengths(summary, mapping(data, "rows")), _labels(summary)]
    parts = [part for part in parts if part]
    return page.section("The data", *parts) if parts else Markup()


def _lengths(summary: Mapping[str, Any], rows: Mapping[str, Any]) -> Markup:
    """Return a table of the rows of each split and of their lengths."""
    told = [
        ("", [split, numbers.exact(number(rows, split)), *(numbers.exact(number(summary, "lengths", split, part))
              for part in ("median", "p95", "longest")), numbers.exact(number(summary, "truncated", split))])
        for split in mapping(summary, "lengths")
    ]  # fmt: skip
    headings = [("Rows of", ""), *((name, "number") for name in ("Rows", "Median tokens", "95 %", "Longest", "Cut"))]
    return page.table("Rows and their lengths in tokens", headings, told) if told else Markup()


def _labels(summary: Mapping[str, Any]) -> Markup:
    """Return a table of the rows of each label in each split, the most frequent first; folded if they are many."""
    labels = mapping(summary, "labels")
    splits = list(dict.fromkeys(split for label in labels for split in mapping(labels, label)))
    if not splits:
        return Markup()
    totals = {split: sum(number(labels, label, split) or 0.0 for label in labels) for split in splits}
    rows = []
    for label in sorted(labels, key=lambda label: -(number(labels, label, splits[0]) or 0.0)):
        counts = [number(labels, label, split) or 0.0 for split in splits]
        shares = (count / totals[split] if totals[split] else 0.0 for count, split in zip(counts, splits, strict=True))
        cells = [
            f"{numbers.exact(count)} ({numbers.share(share)})" for count, share in zip(counts, shares, strict=True)
        ]
        rows.append(("", [label, *cells]))
    found = page.table("Rows of each label", [("Label", ""), *((split, "number") for split in splits)], rows)
    many = tag("summary", f"Rows of each of the {len(rows)} labels")
    return found if len(rows) <= FOLDED else tag("details", many, found)
