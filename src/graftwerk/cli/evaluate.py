"""`graftwerk evaluate`: the figures of a run or an adapter, with intervals and cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, Force, RunOrAdapter, columns_of
from graftwerk.cli.command import Result, command
from graftwerk.cli.output import Output, table
from graftwerk.figures import byte_size, figure, seconds


def register(app: typer.Typer) -> None:
    @command(app, "evaluate")
    def evaluate(
        out: Output,
        target: RunOrAdapter,
        data: Annotated[
            str | None, typer.Option(help="Labelled rows; default: the run's own held-out rows.", show_default=False)
        ] = None,
        column: Columns = None,
        model: Base = None,
        force: Force = False,
    ) -> Result:
        """Measure a trained adapter: figures with intervals, latency, memory, size."""
        from graftwerk.cli.progress import Rows
        from graftwerk.evaluate.run import evaluate

        with Rows(out, "evaluating") as rows:
            result = evaluate(target, data, columns=columns_of(column), model=model, force=force, on_progress=rows)
        show_metrics(out, result["metrics"], title=f"{result['split']}: {result['rows']:,} rows")
        show_cost(out, result["cost"])
        for note in result["notes"]:
            out.warn(f"note: {note}")
        return result


def show_metrics(out: Output, metrics: dict[str, Any], *, title: str) -> None:
    shown = table("metric", "value", "interval", numbers=("value",), title=title)
    for name, measured in metrics.items():
        value, interval = figure(measured)
        note = measured.get("note") if isinstance(measured, dict) else None
        shown.add_row(name, value, f"{interval} ({note})" if note else interval)
    out.show(shown)


def show_cost(out: Output, cost: dict[str, Any]) -> None:
    shown = table("cost", "value", numbers=("value",), title=" ")
    for name, value in cost.items():
        if value is not None and not isinstance(value, dict | list):
            shown.add_row(*_cost(name, value))
    if shown.row_count:
        out.show(shown)


def _cost(name: str, value: float) -> tuple[str, str]:
    """`latency_ms_batch_32` -> (latency a row, batch of 32; 1.2 ms), by the unit in the name."""
    if name.startswith("latency_ms_batch_"):
        return f"latency a row, batch of {name.rpartition('_')[2]}", seconds(value / 1000)
    for ending, written in (("_bytes", byte_size), ("_seconds", seconds)):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " "), written(value)
    return name.replace("_", " "), f"{value:,}"
