"""An explanation as sections of a page: tokens that answers come from, attention, and what each layer learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwerk.formatting import DASH
from graftwerk.reporting import numbers, page
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import at, items, mapping, mappings, number, words
from graftwerk.reporting.labels import cut
from graftwerk.reporting.matrix_charts import Cells, Panel, digest, heat_map, row_bars, small_maps

MOST_TOKENS = 40
"""Tokens of a text that are drawn: those with the largest scores, in the order of the text."""
MOST_LAYERS = 24
"""Layers whose attention is drawn."""
LONGEST = 160
"""Letters of a text in a heading."""


def explanation_page(explanation: Mapping[str, Any], title: str) -> str:
    """Return an explanation as a page of its own."""
    layers, texts = len(mappings(explanation, "layers")), len(mappings(explanation, "attributions"))
    unchanged = {True: "The base is unchanged.", False: "The base DIFFERS from the one used in training."}
    return page.document(
        title=f"Explained: {title}",
        kicker="What an adapter did",
        headline=title,
        deck=[
            f"{numbers.plural(layers, 'layer')} with an update of weights, {numbers.plural(texts, 'text')} explained.",
            unchanged.get(at(explanation, "base_unchanged")),
        ],
        sections=explanation_sections(explanation),
        footer="Written by graftwerk explain; --json gives all numbers.",
    )


def explanation_sections(explanation: Mapping[str, Any]) -> list[Markup]:
    """Return the sections on tokens, attention and layers; those without content are left out.

    Args:
        explanation: What `explain` returns, or contents of `explanation.json`, or empty.
    """
    notes = [page.paragraph(f"{numbers.title(words(note))}.", class_="note") for note in items(explanation, "notes")]
    tokens = [found for one in mappings(explanation, "attributions") if (found := _tokens(one))]
    labels = set[str]()  # names beside maps that are drawn already: most layers have the same
    looks = [found for one in mappings(explanation, "attention") if (found := _attention(one, labels))]
    layers = _layers(mappings(explanation, "layers"))
    sections = []
    if tokens:
        lead = page.paragraph(
            "Integrated gradients: how much each token adds to the score of the answer, or takes from it.",
            class_="note",
        )
        sections.append(page.section("Which words decide", lead, *tokens))
    if looks:
        sections.append(page.section("Where it looks", *looks))
    if layers:
        sections.append(page.section("What was learnt in each layer", layers))
    if notes and sections:
        sections[-1] = Markup(sections[-1].removesuffix("</section>") + join(notes) + "</section>")
    return sections


def _heading(one: Mapping[str, Any]) -> Markup:
    return tag("h3", f"{cut(words(one, 'text'), LONGEST)} \N{RIGHTWARDS ARROW} {cut(words(one, 'answer'), LONGEST)}")


def _folded(caption: str, headings: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[Any]]]) -> Markup:
    return tag("details", tag("summary", "The numbers"), page.table(caption, headings, rows))


def _values(tree: Any, *keys: str) -> list[float]:
    """Return a list of finite numbers, in which what is none counts as 0."""
    return [number({"at": one}, "at") or 0.0 for one in items(tree, *keys)]


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else numbers.MINUS if value < 0 else ''}{abs(value):.3g}"


# -- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(one: Mapping[str, Any]) -> Markup:
    tokens = [words(token) for token in items(one, "adapter", "tokens")]
    sides = {side: found for side in ("adapter", "base") if len(found := _values(one, side, "scores")) == len(tokens)}
    if not tokens or "adapter" not in sides:
        return Markup()
    reach = max((abs(score) for scores in sides.values() for score in scores), default=0.0)
    order = sorted(range(len(tokens)), key=lambda place: -max(abs(scores[place]) for scores in sides.values()))
    shown = sorted(order[:MOST_TOKENS])
    panels = [
        Panel(side, [scores[place] for place in shown], _signed, side, reach, signed=True)
        for side, scores in sides.items()
    ]
    left_out = len(tokens) - len(shown)
    note = (
        f"The {MOST_TOKENS} largest scores are drawn; {left_out} smaller ones are in the table." if left_out else None
    )
    rows = [("", [tokens[at], *(_signed(scores[at]) for scores in sides.values())]) for at in range(len(tokens))]
    misses = ", ".join(f"{side} {_missed(mapping(one, side))}" for side in sides)
    chart = row_bars(f"Scores of the tokens of: {cut(words(one, 'text'), 60)}", [tokens[at] for at in shown], panels)
    return join(
        [
            _heading(one),
            page.figure(chart, f"What the integral misses : {misses}."),
            page.paragraph(note, class_="note") if note else "",
            _folded("Scores of tokens", [("Token", ""), *((side, "number") for side in sides)], rows),
        ]
    )


def _missed(side: Mapping[str, Any]) -> str:
    """Return what the integral misses, and the difference that the scores add up to."""
    whole = (number(side, "value") or 0.0) - (number(side, "baseline") or 0.0)
    missed = abs(number(side, "delta") or 0.0) / abs(whole) if whole else 0.0
    return (
        f"{100 * missed:.2g}{numbers.THIN}% of {_signed(whole)}" if missed >= 1e-4 else f"nothing of {_signed(whole)}"
    )


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(one: Mapping[str, Any], labels: set[str]) -> Markup:
    layers = [layer for layer in mappings(one, "layers") if _maps(layer)]
    if not layers:
        return Markup()
    names = plain_names([words(layer, "name") for layer in layers])
    shares = [number(layer, "share") for layer in layers]
    parts: list[Any] = [_heading(one)]
    if any(share is not None for share in shares):
        panel = Panel("share of attention to the virtual tokens", shares, _percent, reach=1.0)
        parts.append(page.figure(row_bars("Attention to the virtual tokens by layer", names, [panel])))
        most = max(len(items(layer, "shares")) for layer in layers)
        rows = []
        for name, layer, share in zip(names, layers, shares, strict=True):
            heads = [_percent(value) for value in _values(layer, "shares")]
            cells = [name, _percent(share or 0.0), *heads, *[""] * (most - len(heads))]
            rows.append(("", cells))
        headings = [("Layer", ""), ("All heads", "number"), *((f"Head {n + 1}", "number") for n in range(most))]
        parts.append(_folded("Attention to the virtual tokens by layer and head", headings, rows))
    for name, layer in list(zip(names, layers, strict=True))[:MOST_LAYERS]:
        parts.append(_layer_maps(name, layer, one, labels))
    if len(layers) > MOST_LAYERS:
        text = f"The first {MOST_LAYERS} of {len(layers)} layers are drawn; --json has all."
        parts.append(page.paragraph(text, class_="note"))
    legend = (
        "A row is a token that looks, a column what it looks at: the darker, the more. Columns of virtual tokens stand "
        "apart at the left, in another colour. Tokens of long texts are taken together."
    )
    parts.append(page.paragraph(legend, class_="note"))
    return join(parts)


def _maps(layer: Mapping[str, Any]) -> list[list[list[float]]]:
    """Return the maps of a layer's heads, all of one size; none if the file holds anything else."""
    heads = [[_values({"at": row}, "at") for row in head] for head in items(layer, "maps") if isinstance(head, list)]
    sizes = {(len(head), *{len(row) for row in head}) for head in heads}
    good = len(sizes) == 1 and len(size := next(iter(sizes))) == 2 and min(size) > 0
    return heads if good else []


def _layer_maps(name: str, layer: Mapping[str, Any], one: Mapping[str, Any], labels: set[str]) -> Markup:
    maps, apart = _maps(layer), int(number(layer, "virtual_columns") or 0)
    decoder = words(layer, "stack") == "decoder"
    rows = _names(one, "decoder_tokens" if decoder else "tokens", len(maps[0]))
    own = len(maps[0][0]) - apart
    keys = _names(one, "tokens" if layer.get("cross") is True or not decoder else "decoder_tokens", own)
    columns = [*(f"virtual {at + 1}" for at in range(apart)), *keys]
    mean = [[sum(values) / len(maps) for values in zip(*cells, strict=True)] for cells in zip(*maps, strict=True)]
    shares = _values(layer, "shares")
    tips = []
    for head, cells in enumerate(maps):
        value, row, column = max((x, r, c) for r, line in enumerate(cells) for c, x in enumerate(line))
        lines = [f"Head {head + 1}", f"{rows[row]} \N{RIGHTWARDS ARROW} {columns[column]}\t{_percent(value)}"]
        if head < len(shares):
            lines.append(f"to the virtual tokens\t{_percent(shares[head])}")
        tips.append("\n".join(lines))
    share = number(layer, "share")
    summary = name if share is None else f"{name}: {_percent(share)} to the virtual tokens"
    heads = [f"Head {head + 1}" for head in range(len(maps))]
    table, numbered = numbers_of(f"{name}: mean of the heads, in percent", rows, columns, mean, 100.0)
    return tag(
        "details",
        tag("summary", summary),
        page.figure(
            heat_map(
                f"{name}: mean of the heads",
                rows,
                columns,
                mean,
                table,
                apart=apart,
                show=_percent,
                unit=f"{numbers.THIN}%",
                labels=labels,
            )
        ),
        page.figure(small_maps(f"{name}: each head", heads, maps, tips, apart=apart)),
        numbered,
    )


def numbers_of(
    caption: str, rows: Sequence[str], columns: Sequence[str], cells: Cells, scale: float = 1.0
) -> tuple[str, Markup]:
    """Return the id of the table of a map's values, and the table: of each so many times as much.

    Args:
        caption: What it shows.
        rows: Name of each row.
        columns: Name of each column.
        cells: One row of values for each.
        scale: What values are multiplied with.
    """
    digits = 1 if scale > 1 else 3
    lines = [
        ("", [row, *(f"{scale * value:.{digits}f}" if scale * value >= 10**-digits / 2 else "0" for value in ones)])
        for row, ones in zip(rows, cells, strict=True)
    ]
    key = f"t{digest((caption, rows, cells))}"
    headings = [("", ""), *((column, "") for column in columns)]
    return key, page.table(caption, headings, lines, class_="matrix", id_=key)


def _names(one: Mapping[str, Any], key: str, count: int) -> list[str]:
    names = [" ".join(words(token).split()) or "\N{OPEN BOX}" for token in items(one, key)]
    return names if len(names) == count else [str(place + 1) for place in range(count)]


# -- layers -----------------------------------------------------------------------------------------------------------


def _layers(layers: Sequence[Mapping[str, Any]]) -> Markup:
    if not layers:
        return Markup()
    names = plain_names([words(layer, "name") for layer in layers])
    shares, ranks = ([number(layer, key) for layer in layers] for key in ("share", "effective_rank"))
    times = [
        None if (inside := number(layer, "in_main_directions")) is None else inside / (number(layer, "by_chance") or 1)
        for layer in layers
    ]
    alike = [number(layer, "similarity") for layer in layers]
    panels = [
        Panel("norm, of the base's", shares, _percent, "adapter", _most(shares)),
        Panel("effective rank", ranks, lambda value: f"{value:.1f}", "base", _most(ranks)),
    ]
    figures = [page.figure(row_bars("Size and effective rank of each layer's update", names, panels))]
    second = []
    if any(value is not None for value in times):
        second.append(
            Panel("in main directions", times, lambda x: f"{x:.1f}\N{MULTIPLICATION SIGN}", "adapter", _most(times))
        )
    if any(value is not None for value in alike):
        second.append(Panel("similarity", alike, _signed, "base", 1.0, signed=True))
    if second:
        caption = "In main directions: the share of the update there, over the share by chance."
        figures.append(page.figure(row_bars("Where each layer's update lies", names, second), caption))
    spectra: Cells = [_relative(_values(layer, "singular_values")) for layer in layers]
    widest = max((len(one) for one in spectra), default=0)
    if widest:
        cells = [[*one, *[0.0] * (widest - len(one))] for one in spectra]
        columns = [str(place + 1) for place in range(widest)]
        title = "Singular values of each layer's update, over its largest"
        table, numbered = numbers_of(title, names, columns, cells)
        chart = heat_map(title, names, columns, cells, table)
        figures.append(page.figure(chart, "Singular values, over the largest: one dark cell is one direction."))
        figures.append(tag("details", tag("summary", "The numbers"), numbered))
    headings = [
        ("Layer", ""), ("Norm", "number"), ("Of the base", "number"), ("Effective rank", "number"), ("Rank", "number"),
        ("Main directions", "number"), ("Similarity", "number"),
    ]  # fmt: skip
    rows = [
        (
            "",
            [
                page.breakable(name),
                f"{number(layer, 'norm') or 0:.3g}",
                _percent(share or 0.0),
                f"{rank or 0:.1f}",
                words(layer, "rank"),
                DASH if inside is None else f"{inside:.1f}\N{MULTIPLICATION SIGN}",
                DASH if cosine is None else _signed(cosine),
            ],
        )
        for name, layer, share, rank, inside, cosine in zip(names, layers, shares, ranks, times, alike, strict=True)
    ]
    return join([*figures, _folded("Update of each layer", headings, rows)])


def plain_names(names: Sequence[str]) -> list[str]:
    """Return paths without the parts that all of them begin with, or end with.

    Example:
        >>> plain_names(["bert.layer.0.query.lora", "bert.layer.1.query.lora"])
        ['layer.0', 'layer.1']
    """
    split = [name.split(".") for name in names]
    first = next((n for n, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1), 0)
    first -= first > 0 and split[0][first].isdecimal()  # a number alone says nothing
    last = next((n for n, parts in enumerate(zip(*map(reversed, split), strict=False)) if len(set(parts)) > 1), 0)
    return [".".join(parts[first : len(parts) - last]) or ".".join(parts) for parts in split]


def _relative(values: Sequence[float]) -> list[float]:
    largest = max(values, default=0.0)
    return [value / largest for value in values] if largest > 0 else [0.0] * len(values)


def _most(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)


def _percent(value: float) -> str:
    return numbers.share(value)
