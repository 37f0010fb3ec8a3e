"""`graftwerk explain`: what an adapter learnt in each layer, and which tokens its answers come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Force, RunOrAdapter
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table

MOST = 8
"""Tokens that are shown of a text: those with the largest scores."""


def explain(
    out: Output,
    target: RunOrAdapter,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Texts whose answers are explained.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another adapter of the same base, to compare each layer with.", show_default=False),
    ] = None,
    attention: Annotated[
        bool,
        typer.Option("--attention", help="Show where each text's pass looks, and the share that a prefix takes."),
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the result in the run's folder; `graftwerk report` shows it.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with pictures.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --html.")] = False,
    model: Base = None,
    force: Force = False,
) -> Result:
    """Show what an adapter did: each layer's update, and the tokens that answers come from.

    Token scores are integrated gradients; for tasks in which the model writes, they are shown next to the base's
    scores for the same answer.

    Raises:
        ConfigError: `--overwrite` without `--html`.
    """
    from graftwerk.display import shown_rows
    from graftwerk.errors import ConfigError
    from graftwerk.inspection.explain import explain
    from graftwerk.reporting.html import check_free, write_explanation

    if overwrite and html is None:
        raise ConfigError("--overwrite is for the file of --html", hint="--html explained.html")
    if html is not None:
        check_free(html, overwrite)
    out.note("loading the adapter ...")
    with shown_rows("explained", None, out.quiet) as rows:
        found = explain(
            target,
            texts or (),
            against=against,
            attention=attention,
            save=save,
            model=model,
            force=force,
            on_progress=rows,
        )
    for note in found["notes"]:
        out.note(note)
    if found["layers"]:
        show_layers(out, found["layers"], against is not None)
    for each in found["attributions"]:
        show_tokens(out, each)
    for each in found["attention"]:
        show_attention(out, each)
    if found["base_unchanged"] is not None:
        out.line(
            "the base is unchanged" if found["base_unchanged"] else "the base DIFFERS from the one used in training"
        )
    if html is not None:
        found["html"] = write_explanation(html, found, Path(target).resolve().name, overwrite=overwrite)
        out.line(str(html))
    return found


def show_layers(out: Output, layers: list[dict[str, Any]], compared: bool) -> None:
    """Show the update of each layer."""
    names = (
        "layer",
        "norm",
        "of the base",
        "effective rank",
        "main directions",
        *(("similarity",) if compared else ()),
    )
    shown = table(*names, numbers=names[1:])
    for one in layers:
        rank = f"{one['effective_rank']:.1f}" + ("" if one["rank"] is None else f" of {one['rank']}")
        inside = "-" if one["in_main_directions"] is None else f"{one['in_main_directions'] / one['by_chance']:.1f} x"
        row = [printable(one["name"]), f"{one['norm']:.3g}", f"{one['share']:.2%}", rank, inside]
        if compared:
            row.append("-" if one["similarity"] is None else f"{one['similarity']:+.3f}")
        shown.add_row(*row)
    out.show(shown)


def show_tokens(out: Output, each: dict[str, Any]) -> None:
    """Show the tokens with the largest scores of one text, the base's score of each beside.

    Args:
        out: The command's output.
        each: One of the attributions that `explain` returns.
    """
    adapter, base = each["adapter"], each["base"]
    out.line(f"{printable(each['text'])[:100]} -> {printable(each['answer'])[:100]}")
    shown = table("token", "adapter", *(("base",) if base else ()), numbers=("adapter", "base"))
    order = sorted(range(len(adapter["tokens"])), key=lambda place: -abs(adapter["scores"][place]))
    for place in order[:MOST]:
        row = [printable(adapter["tokens"][place]), f"{adapter['scores'][place]:+.3f}"]
        if base:
            row.append(f"{base['scores'][place]:+.3f}")
        shown.add_row(*row)
    out.show(shown)


def show_attention(out: Output, each: dict[str, Any]) -> None:
    """Show where each layer looks in the pass of one text: how much goes to virtual tokens, and the token seen most.

    Args:
        out: The command's output.
        each: One of the texts' attention that `explain` returns.
    """
    out.line(f"attention in {printable(each['text'])[:100]} -> {printable(each['answer'])[:100]}")
    numbers = ("virtual tokens", "to them", "by head")
    shown = table("layer", *numbers, "seen most", numbers=numbers)
    for one in each["layers"]:
        keys = each["decoder_tokens"] if one["stack"] == "decoder" and not one["cross"] else each["tokens"]
        columns = [sum(row[column] for head in one["maps"] for row in head) for column in range(len(one["maps"][0][0]))]
        text = columns[one["virtual_columns"] :]
        most = max(range(len(text)), key=text.__getitem__)
        share, shares = one["share"], one["shares"]
        ends = "" if shares is None else f"{min(shares):.0%} to {max(shares):.0%}"
        row = (str(one["virtual"] or ""), "" if share is None else f"{share:.1%}", ends)
        shown.add_row(printable(one["name"]), *row, f"{printable(keys[most])} ({text[most] / sum(columns):.0%})")
    out.show(shown)
