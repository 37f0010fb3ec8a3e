"""`graftwerk train`: from a run file to a run folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile, DryRun, Overrides
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.formatting import byte_size, duration

IN_PROGRESS = frozenset(("step_seconds", "planned_step_seconds", "planned_peak_memory_bytes"))
"""Costs that the last line of the progress shows."""


def train(
    out: Output,
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in output_dir, bit for bit.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train despite severe findings about the data (data.allow=[all]).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    dry_run: DryRun = False,
) -> Result:
    """Train an adapter from a run file.

    Writes a run folder with the adapter, the metrics, the events and a report; its path is the last line printed.
    """
    from graftwerk.config import RunConfig

    settings = RunConfig.load(config, [*(overrides or []), *(["data.allow=[all]"] if force else [])])
    if dry_run:
        from graftwerk.cli.doctor import show_preflight
        from graftwerk.experiments.preflight import preflight
        from graftwerk.training.data_checks import raise_on_severe

        checked = preflight(settings)
        show_preflight(out, checked)
        raise_on_severe(checked["findings"], checked["allowed"])
        return {"dry_run": True, **checked}
    from graftwerk.machine import process_start
    from graftwerk.training.distributed import is_main_process
    from graftwerk.training.progress_display import Progress
    from graftwerk.training.train import run_training

    with Progress(quiet=out.quiet) as progress:
        run = run_training(settings, resume=resume, overwrite=overwrite, listener=progress, started_at=process_start())
    if not is_main_process():  # under `accelerate launch`: only the main process prints
        return None
    from graftwerk.reporting.html import write_report
    from graftwerk.training.retained import refuse_forgotten

    report = write_report(run.folder)
    show_run(out, run.manifest)
    out.line(str(run.folder))
    refuse_forgotten(run.manifest, run.adapter)
    return {**run.to_dict(), "report": report}


def show_run(out: Output, manifest: dict[str, Any]) -> None:
    """Show the metrics of a finished run, on the test rows or else on the validation rows, and its cost."""
    from graftwerk.cli.evaluate import show_cost, show_metrics, show_sets

    metrics = manifest["metrics"]
    for split in ("test", "validation"):
        if metrics.get(split):
            show_metrics(out, metrics[split], title=f"{split}: {manifest['data']['rows'][split]:,} rows")
            show_sets(out, manifest.get("metrics_by_set", {}).get(split, {}))
            break
    if retained := manifest.get("retained"):
        show_retained(out, retained)
    if known := manifest["cost"].get("retention"):
        took = duration(known["start_seconds"] + known["step_seconds"])
        out.note(f"against forgetting: {', '.join(known['strategies'])}; {took}, {byte_size(known['bytes'])} held")
    show_cost(out, {key: value for key, value in manifest["cost"].items() if key not in IN_PROGRESS})


def show_retained(out: Output, retained: dict[str, Any]) -> None:
    """Show what was measured before and after the training, and what of it was lost."""
    from graftwerk.evaluation.metrics import METRICS

    shown = table("retained", "metric", "before", "after", "lost", "interval", numbers=("before", "after", "lost"))
    for name, entry in retained["entries"].items():
        lost = entry["forgetting"]
        if lost is None:
            shown.add_row(printable(name), "", "", "", "", printable(entry["note"]))
            continue
        metric = METRICS[entry["metric"]]
        unit = "points" if metric.words == " points" else "%"
        before, after = (metric.text(entry[part]["value"]) for part in ("before", "after"))
        interval = f"{lost['low']:.1f} to {lost['high']:.1f}"
        shown.add_row(printable(name), metric.title, before, after, f"{lost['value']:.1f} {unit}", interval)
    out.show(shown)
