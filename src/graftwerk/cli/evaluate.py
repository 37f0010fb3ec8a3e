"""`graftwerk evaluate`: the figures of a run or an adapter, with intervals and cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import RunOrAdapter
from graftwerk.cli.command import Result, command
from graftwerk.cli.figures import byte_size, figure, seconds
from graftwerk.cli.output import Output, table


def register(app: typer.Typer) -> None:
    @command(app, "evaluate")
    def evaluate(
        out: Output,
        target: RunOrAdapter,
        data: Annotated[
            str | None,
            typer.Option(help="Labelled rows: a file or pkg://package/file. Default: the run's own held-out rows."),
        ] = None,
    ) -> Result:
        """Measure a trained adapter: accuracy, F1, ROC-AUC with intervals; latency, memory, size."""
        from graftwerk.evaluate.run import evaluate

        result = evaluate(target, data=data)
        show_metrics(out, result["metrics"], title=f"{result['rows']:,} rows")
        show_cost(out, result["cost"])
        return result


def show_metrics(out: Output, metrics: dict[str, Any], *, title: str) -> None:
    shown = table("metric", "value", "interval", numbers=("value",), title=title)
    for name, measured in metrics.items():
        value, interval = figure(measured)
        shown.add_row(name, value, interval)
    out.show(shown)


def show_cost(out: Output, cost: dict[str, Any]) -> None:
    shown = table("cost", "value", numbers=("value",))
    for name, value in cost.items():
        if value is None or isinstance(value, dict | list):
            continue
        text = (
            byte_size(value) if name.endswith("bytes") else seconds(value) if name.endswith("seconds") else f"{value}"
        )
        shown.add_row(name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " "), text)
    if shown.row_count:
        out.show(shown)
