"""`graftwerk doctor`: the machine's capabilities, and the problems of a run before it costs anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Overrides
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.formatting import byte_size, count, duration, share
from graftwerk.training.batch_display import show_batch


def doctor(
    out: Output,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A run file to check.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> Result:
    """Check the machine, and with a run file its data and settings.

    Without a run file: cores, memory, versions, the compute type that is fast here. With one: columns, labels,
    lengths, truncation, duplicates, what would be trained. No model is loaded.
    """
    from graftwerk.cli.machine import describe_machine

    machine = describe_machine()
    show_machine(out, machine)
    if config is None:
        return {"machine": machine}
    from graftwerk.config import RunConfig
    from graftwerk.experiments.preflight import preflight
    from graftwerk.training.data_checks import raise_on_severe

    checked = preflight(RunConfig.load(config, overrides))
    show_preflight(out, checked)
    raise_on_severe(checked["findings"], checked["allowed"])
    return {"machine": machine, "run": checked}


def show_machine(out: Output, machine: dict[str, Any]) -> None:
    """Show cores, memory in bytes, devices, compute type and versions, as `describe_machine` returns them."""
    from graftwerk.cli.machine import OPTIONAL

    shown = table("machine", "")
    shown.add_row("system", f"{machine['system']}, Python {machine['python']}")
    threads = machine["threads"]
    shown.add_row("cores", f"{machine['cores']} ({threads} thread{'' if threads == 1 else 's'} in torch)")
    total, free = machine["memory_bytes"], machine["memory_available_bytes"]
    if total is not None:
        shown.add_row("memory", byte_size(total) + (f", {byte_size(free)} available" if free is not None else ""))
    shown.add_row("devices", ", ".join(machine["devices"]) or "no GPU")
    shown.add_row("compute type", f"{machine['compute_type']} (the fastest here, by a short probe)")
    for name, version in machine["versions"].items():
        shown.add_row(name, version or f"not installed ({OPTIONAL.get(name, 'needed')})")
    out.show(shown)


def with_augmented(made: int | None) -> str:
    """Return the note behind a number of steps that counts augmented rows, or "" if there are none."""
    return "" if made is None else f" (at most: {made:,} augmented rows are counted, before any are left out)"


def describe_trunk(trunk: dict[str, Any]) -> str:
    """Return one line on the activation cache: the frozen layers computed only once, or why there are none."""
    if not trunk["on"]:
        return f"every layer is computed at every step: {trunk['why_not']}"
    return (
        f"the lowest {trunk['layers_skipped']} of {trunk['layers']} layers are frozen and computed once for "
        f"{trunk['rows']:,} rows; {byte_size(trunk['bytes'])} of hidden states are cached"
    )


def describe_cost(plan: dict[str, Any], seconds: float | None = None) -> str:
    """Return the planned time and memory of a training, or why they are not known.

    Args:
        plan: The plan, as `preflight` returns it.
        seconds: Time of several trainings, in place of that of one.
    """
    if why := plan.get("why_not"):
        return f"not known: {why}"
    memory, time, free = plan["memory"], plan["time"], plan["available_bytes"]
    there = "" if free is None else f" ({byte_size(free)} available)"
    return (
        f"about {duration(time['training_seconds'] if seconds is None else seconds)}, "
        f"{byte_size(memory['train_peak_bytes'])} of memory{there}, an adapter of {byte_size(plan['adapter_bytes'])}"
    )


def show_preflight(out: Output, checked: dict[str, Any]) -> None:
    """Show model, method, steps, rows and findings of a run file, as `preflight` returns them."""
    data, parameters, model = checked["data"], checked["parameters"], checked["model"]
    bits = f" (linear layers in {model['quantization']['name']})" if "quantization" in model else ""
    out.line(
        f"\nmodel   {model['name']}: {model['kind']}, {count(parameters['total'])} parameters in {model['dtype']}"
        f"{bits}, rows of up to {model['max_length']} tokens"
    )
    out.line(
        f"method  {checked['method']['name']}: trains {count(parameters['trained'])} parameters "
        f"({share(parameters['share'])}), {count(parameters['head'])} of them in the head, "
        f"learning rate {checked['learning_rate']:g}"
    )
    out.line(
        f"steps   {checked['steps']:,} of {checked['rows_per_step']} rows, {checked['steps_per_epoch']:,} an epoch"
        + with_augmented(data["augmented_at_most"])
    )
    out.line(f"trunk   {describe_trunk(checked['trunk'])}")
    out.line(f"cost    {describe_cost(checked['plan'])}")
    place = checked["output_dir"]
    out.line(
        f"output  {place['path']}"
        + (
            " (holds a run: --resume continues it, --overwrite replaces it)"
            if place["holds_a_run"]
            else " (exists already)"
            if place["exists"]
            else ""
        )
    )
    shown = table(
        "rows",
        "",
        "median",
        "95 %",
        "longest",
        "cut",
        numbers=("", "median", "95 %", "longest", "cut"),
        title="\ntokens of a row",
    )
    for split, rows in data["rows"].items():
        lengths = data["lengths"][split]
        cut = data["truncated"][split]
        shown.add_row(split, f"{rows:,}", *(str(lengths[key]) for key in ("median", "p95", "longest")), f"{cut:,}")
    out.show(shown)
    splits = list(data["rows"])
    if data["labels"]:
        labels = table("label", *splits, numbers=splits, title="\nrows of each label")
        for label, counts in data["labels"].items():
            labels.add_row(printable(label), *(f"{counts[split]:,}" for split in splits))
        out.show(labels)
    show_batch(checked["first_batch"], sys.stderr if out.as_json else sys.stdout)
    for finding in checked["findings"]:
        out.line(f"\n{'SEVERE' if finding['grave'] else 'note'}: {printable(finding['message'])}")
        for key in ("example", "hint"):
            if finding[key]:
                out.line(f"  {key}: {printable(finding[key])}")
    if not checked["findings"]:
        out.line("\nno problems found")
