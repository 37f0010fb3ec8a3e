"""`graftwerk recommend`: which method for this model, these rows, this memory and this aim, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, table

SHOWN = 5
"""Methods whose reasons are printed; `--json` has all."""


def recommend(
    out: Output,
    config: ConfigFile,
    aim: Annotated[str, typer.Option("--aim", help="quality, memory, speed, size or many-tasks.")] = "quality",
    memory: Annotated[str | None, typer.Option("--memory", help="What training may take, as 8GB.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", help="Where earlier comparisons and searches are; default: beside output_dir."),
    ] = None,
) -> Result:
    """Recommend a method: ranked, with reasons, sources, the plan's figures and the command to run.

    From a table of rules, the plan of each method, and the comparisons and searches found under a folder. Nothing
    is trained and no weight is loaded.
    """
    from graftwerk.cli.plan import bytes_of
    from graftwerk.experiments.recommendation.recommend import recommend
    from graftwerk.formatting import byte_size, count, seconds

    limit = None if memory is None else bytes_of(memory, "--memory")
    found = recommend(config, aim, memory=limit, runs=runs, say=lambda text: out.note(f"{text} ..."))
    case = found["case"]
    room = f", {byte_size(case['memory_bytes'])} of memory" if case["memory_bytes"] else ""
    size = f"{count(case['parameters'])} parameters, {count(case['rows'])} training rows"
    out.line(f"aim {aim}: {size}, {case['task']}{room}\n")
    shown = table("method", "points", "peak", "adapter", "step", numbers=("points", "peak", "adapter", "step"))
    for one in found["ranked"]:
        plan, points = one["plan"], f"{one['points']:+.1f}"
        if plan is None:
            shown.add_row(one["label"], points, "-", "-", "not planned")
            continue
        peak, size = plan["memory"]["train_peak_bytes"], plan["adapter_bytes"]
        step = seconds(plan["time"]["step_seconds"])
        shown.add_row(one["label"], points, byte_size(peak), byte_size(size), step)
    out.show(shown)
    for one in found["ranked"][:SHOWN]:
        _show_reasons(out, one)
    for one in found["left_out"]:
        out.line(f"left out: {one['label']}: {one['reason']}")
    out.line("\nnot known:")
    for text in found["unknown"]:
        out.line(f"  - {text}")
    return found


def _show_reasons(out: Output, one: dict[str, Any]) -> None:
    out.line(f"\n{one['label']}")
    for reason in one["reasons"]:
        points = f"{reason['points']:+.1f}" if reason["points"] else "    "
        out.line(f"  {points}  {reason['text']} [{reason['source']}]")
    out.line(f"  {one['command']}")
