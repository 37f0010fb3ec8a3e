"""The section of a run's page on what it was not to forget: before, after, and points lost with their interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup
from graftwerk.reporting.files import items, mapping, number, words
from graftwerk.reporting.interval_plot import scale_of, strip


def retained_section(retained: Mapping[str, Any]) -> Markup:
    """Return the section, empty if nothing was to be retained."""
    entries = mapping(retained, "entries")
    if not entries:
        return Markup()
    ends = [number(entries, name, "forgetting", part) for name in entries for part in ("value", "low", "high")]
    scale, exceeded = scale_of(ends, zero=True), {str(name) for name in items(retained, "exceeded")}
    rows = [_row(name, mapping(entries, name), scale, name in exceeded) for name in entries]
    headings = [
        ("What", ""), ("Metric", ""), ("Before", "number"), ("After", "number"), ("Lost", "number"),
        ("Interval", "number"), ("Lost, beside zero", ""),
    ]  # fmt: skip
    limit = words(retained, "limit")
    said = "Lost: points, or percent of a perplexity or an error; the interval is that of the paired difference."
    judged = []
    if limit:
        kept = "No more than that was lost." if not exceeded else "More was lost: the run is not handed over."
        judged = [page.messages([page.message(f"Limit {limit}:", kept, grave=bool(exceeded))])]
    return page.section(
        "What was forgotten",
        *judged,
        page.table("Forgetting", headings, rows),
        page.paragraph(said, class_="note"),
    )


def _row(name: str, entry: Mapping[str, Any], scale: Any, exceeded: bool) -> tuple[str, list[Any]]:
    metric, lost = words(entry, "metric"), mapping(entry, "forgetting")
    value, low, high = (number(lost, part) for part in ("value", "low", "high"))
    if value is None:
        return "", [name, words(entry, "note"), *([DASH] * 4), ""]
    before, after = (numbers.value_of(metric, number(entry, part, "value")) for part in ("before", "after"))
    interval = f"{numbers.lost(low)} to {numbers.lost(high)}"
    drawing = strip(scale, value, low, high, zero=True, said=f"{numbers.lost(value)} lost, interval {interval}")
    kind = "recommended" if exceeded else ""
    return kind, [name, numbers.metric_name(metric), before, after, numbers.lost(value), interval, drawing]
