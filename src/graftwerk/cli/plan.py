"""`graftwerk plan`: memory, time and size of a run before any weight is loaded."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile, Overrides
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, table

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def plan(
    out: Output,
    config: ConfigFile,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--table", help="Compare all methods at their defaults.")] = False,
    fit: Annotated[str | None, typer.Option("--fit", help="Say what to change for this memory, as 24GB.")] = None,
) -> Result:
    """Plan a run: the memory of training and evaluation, the time of a step, the size of the adapter.

    From the model's configuration and the rows alone, by one step on tensors without values. Nothing is trained
    and no weight is loaded.
    """
    from graftwerk.config import RunConfig
    from graftwerk.formatting import byte_size, duration, seconds
    from graftwerk.training.planning.plan import Planner

    limit = None if fit is None else bytes_of(fit, "--fit")
    settings = RunConfig.load(config, overrides or [])
    out.note("reading the rows ...")
    planner = Planner(settings)
    out.note("tracing a step ...")
    found = planner.plan()
    memory, time = found["memory"], found["time"]
    shown = table("memory", "bytes", numbers=("bytes",))
    for key, value in memory.items():
        shown.add_row(key.removesuffix("_bytes").replace("_", " "), byte_size(value))
    out.show(shown)
    out.line(f"adapter  {byte_size(found['adapter_bytes'])}")
    each, whole = seconds(time["step_seconds"]), duration(time["training_seconds"])
    out.line(f"time     {each} a step, {duration(time['epoch_seconds'])} an epoch, {whole} in all")
    traced, processes = found["traced"], found["processes"]
    several = f", in each of {processes} processes" if processes > 1 else ""
    out.line(f"memory is that of {traced['rows']} rows of {traced['tokens']} tokens, the longest there are{several}")
    if found["fits"] is not None:
        said = "fits into" if found["fits"] else "does not fit into"
        rows = found["largest_batch"]
        largest = "" if rows is None else f"; largest batch: {rows:,} rows"
        out.line(f"{said} the {byte_size(found['available_bytes'])} available{largest}")
    if every:
        found["methods"] = _every_method(out, planner)
    if limit is not None:
        found["fit"] = _fit(out, planner, limit)
    return found


def bytes_of(text: str, option: str) -> int:
    """Return the bytes that a size such as `24GB`, `16GiB`, `800 MB` or `1.5e9` means.

    Raises:
        ConfigError: It is no size above 0.

    Example:
        >>> bytes_of("1.5GB", "--fit"), bytes_of("2KiB", "--fit")
        (1500000000, 2048)
    """
    from graftwerk.errors import ConfigError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        hint = f"{option} 24GB, or {option} 800MB"
        raise ConfigError(f"`{text}` is not a memory size", where=option, hint=hint)
    return size


def _every_method(out: Output, planner: Any) -> list[dict[str, Any]]:
    """Show and return the plan of each method at its defaults; one that does not suit the model has its reason."""
    from graftwerk.config import RunConfig
    from graftwerk.errors import GraftwerkError
    from graftwerk.formatting import byte_size, count, seconds
    from graftwerk.methods.registry import METHODS

    rows: list[dict[str, Any]] = []
    shown = table("method", "peak", "adapter", "step", numbers=("peak", "adapter", "step"))
    for place, name in enumerate(METHODS, start=1):
        out.note(f"tracing {name} ({place} of {count(len(METHODS))}) ...")
        try:
            tree = planner.config.model_dump(mode="json") | {"method": name}
            found = planner.plan(RunConfig.build(tree, {}))
        except GraftwerkError as error:
            rows.append({"method": name, "reason": str(error)})
            shown.add_row(name, "-", "-", str(error).splitlines()[0][:60])
            continue
        rows.append({"method": name, **found})
        peak, size = found["memory"]["train_peak_bytes"], found["adapter_bytes"]
        shown.add_row(name, byte_size(peak), byte_size(size), seconds(found["time"]["step_seconds"]))
    out.show(shown)
    return rows


def _fit(out: Output, planner: Any, limit: int) -> dict[str, Any] | None:
    """Show and return what to change for training to fit into ``limit`` bytes, or None if nothing suffices."""
    from graftwerk.formatting import byte_size

    out.note("trying smaller micro-batches ...")
    found: dict[str, Any] | None = planner.fit(limit)
    if found is None:
        smaller = "" if planner.config.quantization is not None else ", or a base in 4 bits (quantization=nf4)"
        out.line(
            f"nothing makes it fit into {byte_size(limit)}: a smaller model, shorter rows (data.max_length){smaller}"
        )
    elif found["overrides"]:
        peak = byte_size(found["plan"]["memory"]["train_peak_bytes"])
        out.line(f"fits into {byte_size(limit)} with: {' '.join(found['overrides'])} (peak {peak})")
    else:
        out.line(f"fits into {byte_size(limit)} as it is")
    return found
