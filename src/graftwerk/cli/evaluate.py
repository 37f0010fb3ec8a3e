"""`graftwerk evaluate`: the metrics of a run or an adapter, with intervals and cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, EvaluationOverrides, Force, RunOrAdapter, columns_of, evaluation_of
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.formatting import DASH, byte_size, figure, seconds


def evaluate(
    out: Output,
    target: RunOrAdapter,
    settings: EvaluationOverrides = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled rows; default: the run's own held-out rows.", show_default=False)
    ] = None,
    column: Columns = None,
    model: Base = None,
    force: Force = False,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Measure the unadapted base too; default: as the run file says.",
            show_default=False,
        ),
    ] = None,
) -> Result:
    """Measure a trained adapter: metrics with intervals, latency, memory, size."""
    from graftwerk.evaluation.evaluate import evaluate

    result = evaluate(
        target,
        data,
        columns=columns_of(column),
        model=model,
        force=force,
        baseline=baseline,
        evaluation=evaluation_of(settings),
        quiet=out.quiet,
    )
    before = (result.get("baseline") or {}).get("metrics")
    show_metrics(out, result["metrics"], title=f"{result['split']}: {result['rows']:,} rows", before=before)
    show_sets(out, result["metrics_by_set"])
    show_examples(out, result.get("examples") or [])
    show_cost(out, result["cost"])
    compute = result["compute"]
    out.note(f"computed in {compute['type']} on {compute['device']}, {compute['eval_batch_size']} rows a forward pass")
    for note in result["notes"]:
        out.warn(f"note: {note}")
    return result


def show_metrics(out: Output, metrics: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> None:
    """Show one row per metric, with the base's value beside it if it was measured."""
    names = (
        ("metric", "value", "interval") if before is None else ("metric", "base", "interval ", "adapter", "interval")
    )
    shown = table(*names, numbers=("value", "base", "adapter"), title=title)
    for name, measured in metrics.items():
        cells = [name, *(_figure(name, before.get(name)) if before is not None else ()), *_figure(name, measured)]
        note = measured.get("note") if isinstance(measured, dict) else None
        if note:
            cells[-1] += f" ({note})"
        shown.add_row(*cells)
    out.show(shown)
    signatures = {measured["signature"]: name for name, measured in metrics.items() if "signature" in (measured or {})}
    for signature, name in signatures.items():
        out.note(f"{name}: {signature}")


def show_sets(out: Output, sets: dict[str, Any]) -> None:
    """Show one row per data set, or direction of translation, if there are several."""
    if not sets:
        return
    names = list(dict.fromkeys(name for metrics in sets.values() for name in metrics))
    shown = table("set", *names, numbers=names)
    for each, metrics in sets.items():
        shown.add_row(printable(each), *(_figure(name, metrics.get(name))[0] for name in names))
    out.show(shown)


def _figure(name: str, measured: Any) -> tuple[str, str]:
    """Format a metric: BLEU 23.4, ROUGE-L 39.6 %, perplexity 12.3; those of classes as shares."""
    from graftwerk.evaluation.metrics import METRICS

    known = METRICS.get(name)
    if (
        known is None
        or known.cells
        or name == "roc_auc"
        or known.unit == "correlation"
        or not isinstance(measured, dict)
    ):
        return figure(measured)
    ending = " %" if known.unit == "share" else ""
    value, low, high = (
        None if measured.get(part) is None else known.text(measured[part]) for part in ("value", "low", "high")
    )
    return DASH if value is None else value + ending, "" if low is None or high is None else f"{low} to {high}{ending}"


def show_examples(out: Output, examples: list[dict[str, Any]]) -> None:
    """Show sample answers: source, reference, and the answers of the base without and with the adapter."""
    for example in examples:
        shown = table("", "", title=" ")
        shown.show_header = False
        for part in ("source", "reference", "before", "after"):
            if example.get(part) is not None:
                shown.add_row(part, printable(example[part]))
        out.show(shown)


def show_cost(out: Output, cost: dict[str, Any]) -> None:
    """Show the costs that are single numbers, each with the unit that its name says; the others are left out."""
    shown = table("cost", "value", numbers=("value",), title=" ")
    for name, value in cost.items():
        if value is not None and not isinstance(value, dict | list):
            shown.add_row(*_cost(name, value))
    if shown.row_count:
        out.show(shown)


def _cost(name: str, value: float) -> tuple[str, str]:
    """Convert `latency_ms_batch_32` to (latency a row, batch of 32; 1.2 ms), by the unit in the name."""
    if name.startswith("latency_ms_batch_"):
        return f"latency a row, batch of {name.rpartition('_')[2]}", seconds(value / 1000)
    for ending, written in (("_bytes", byte_size), ("_seconds", seconds)):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " "), written(value)
    return name.replace("_", " "), f"{value:,}"
