"""`graftwerk combine`: a weighted sum of adapters of one base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, Force, columns_of
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, table
from graftwerk.errors import ConfigError
from graftwerk.formatting import count, figure


def combine(
    out: Output,
    parts: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER=WEIGHT ...", help="Runs or adapters with their weights: runs/a=0.7."),
    ],
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write: new or empty.")],
    by: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare or della.")] = "linear",
    subtract: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER[=WEIGHT]", help="Subtract this adapter; may be repeated.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result at each layer, at most.", show_default=False)
    ] = None,
    density: Annotated[float, typer.Option(help="Share of an update that ties, dare and della keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Random seed of dare and della.")] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled rows to measure the sum and its parts on.", show_default=False),
    ] = None,
    column: Columns = None,
    model: Base = None,
    force: Force = False,
) -> Result:
    """Add adapters of one base up: the sum is a LoRA.

    The updates of the weights are added, which is exact also for negative weights and for parts of different ranks
    and methods. A merged adapter is often worse than its parts: --data measures it against them.
    """
    from graftwerk.exports.combine import combine

    given = [weighted(part) for part in parts]
    given += [(part, -weight) for part, weight in map(weighted, subtract or ())]
    out.note("loading the adapters, and adding them up ...")
    result = combine(
        given,
        folder,
        by=by,  # type: ignore[arg-type]  # checked there
        rank=rank,
        density=density,
        seed=seed,
        model=model,
        force=force,
        data=data,
        columns=columns_of(column),
    )
    for note in result["notes"]:
        out.note(note)
    lost = f", {100 * result['residual']:.2g} % of the update left out" if result["residual"] else ""
    out.note(f"{count(result['parameters'])} parameters, rank up to {result['rank']}{lost}")
    if result["metrics"] is not None:
        show(out, result["metrics"])
    out.line(str(result["out"]))
    return result


def weighted(text: str) -> tuple[str, float]:
    """Parse `runs/a=0.7`; without a number the weight is 1.

    Raises:
        ConfigError: What follows the last `=` is no number, and no folder is called so.

    Example:
        >>> weighted("runs/lr=1e-3=0.5"), weighted("runs/a")
        (('runs/lr=1e-3', 0.5), ('runs/a', 1.0))
    """
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        raise ConfigError(f"`{number}` is not a number", where=text, hint="runs/a=0.7, or runs/a=-0.5") from None


def show(out: Output, metrics: dict[str, Any]) -> None:
    """Show the metrics of the sum and its parts, and how the sum differs from each."""
    shown = table("adapter", "metric", "value", "sum minus it", numbers=("value", "sum minus it"), title=" ")
    against = {each["b"]: each for each in metrics["differences"]}
    for adapter, values in metrics["by_adapter"].items():
        for place, (name, value) in enumerate(values.items()):
            one = against.get(adapter)
            apart = ""
            if one is not None and one["metric"] == name:
                apart = f"{one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
            shown.add_row(adapter if place == 0 else "", name, " ".join(figure(value)).strip(), apart)
    out.show(shown)
