"""The effect of each axis of an ablation: the mean of each value with its interval, and what the differences show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.reporting import numbers, page, verdicts
from graftwerk.reporting.escape import Markup, tag
from graftwerk.reporting.files import items, mapping, mappings, number, words
from graftwerk.reporting.interval_plot import scale_of, strip


def ablation(result: Mapping[str, Any], metric: str) -> Markup:
    """Return the section on the effects, empty for a comparison of methods."""
    effects = mappings(mapping(result, "ablation"), "effects")
    if not effects:
        return Markup()
    grid = words(result, "ablation", "design") == "grid"
    how = (
        "Means over all combinations of the other settings that were measured with every value of this one."
        if grid
        else "Each value alone is changed; the first is the run file's own."
    )
    key = words(result, "metric")
    parts: list[Any] = [page.paragraph(f"{how} All on the same rows and seeds.")]
    for effect in effects:
        parts.append(tag("h3", words(effect, "axis")))
        levels = mappings(effect, "levels")
        if not levels:
            parts.append(page.paragraph("Runs failed, and no combination has every value.", class_="missing"))
            continue
        bounds = [number(level, "figure", part) for level in levels for part in ("value", "low", "high")]
        scale, rows = scale_of(bounds), []
        for level in levels:
            figure = mapping(level, "figure")
            value, low, high = (number(figure, part) for part in ("value", "low", "high"))
            name, interval = words(level, "value"), numbers.interval_of(key, figure)
            said = f"{name}: {numbers.value_of(key, value)}, interval {interval}"
            cells = [
                name, str(len(items(level, "cells"))), numbers.bare(key, value), interval,
                strip(scale, value or 0.0, low, high, said=said),
            ]  # fmt: skip
            rows.append(("", cells))
        headings = [
            ("Value", ""), ("Cells", "number"), (numbers.heading(key), "number"), ("Interval", "number"),
            ("Mean and interval", ""),
        ]  # fmt: skip
        parts.append(page.table(f"Means by {words(effect, 'axis')}", headings, rows))
        found = verdicts.differences({"metric": key, "seeds": items(result, "seeds"), **effect})
        said = "; ".join(f"{d.a} against {d.b}: {_text(d, key)}" for d in found)
        parts.append(page.paragraph(f"{said}. Intervals hold together for {metric} and this setting.", class_="note"))
    return page.section("Effect of each setting", *parts)


def _text(difference: verdicts.Difference, metric: str) -> str:
    low, high = (numbers.signed(metric, bound) for bound in (difference.low, difference.high))
    span = f"{numbers.signed(metric, difference.value)}{numbers.unit(metric)} ({low} to {high})"
    if difference.one_seed:
        return f"{span}, one seed"
    return f"{difference.verdict}, {span}"
