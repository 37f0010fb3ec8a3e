"""`graftwerk inspect`: what is in an adapter folder, through the gate for foreign files; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.command import Result, command
from graftwerk.cli.figures import byte_size, count, figure
from graftwerk.cli.output import Output, printable, table


def register(app: typer.Typer) -> None:
    @command(app, "inspect")
    def inspect(
        out: Output,
        target: Annotated[Path, typer.Argument(metavar="ADAPTER_OR_RUN", help="An adapter folder or a run folder.")],
        modules: Annotated[
            bool, typer.Option("--modules", help="One line for each module, not only for each layer.")
        ] = False,
    ) -> Result:
        """Show what an adapter touches, holds and learnt, and where it comes from."""
        from graftwerk.explain.adapter import describe_adapter

        # A run folder keeps its adapter under this name; an adapter folder holds no folder of that name with a config.
        inner = target / "adapter"
        described = describe_adapter(inner if (inner / "adapter_config.json").is_file() else target)
        show_origin(out, described)
        show_learnt(out, described, modules=modules)
        return described


def show_origin(out: Output, described: dict[str, Any]) -> None:
    base, metadata, method = described["base"], described["metadata"], described["method"]
    lines = {
        "adapter": described["folder"],
        "method": f"{method.get('name') or described['peft_type']} (PEFT type {described['peft_type']})",
        "base": base["name"] or "not said",
        "fingerprint": base["fingerprint"] or "none: made by another tool, so any base of the right shape is accepted",
        "stored": f"{count(described['parameters'])} parameters, {byte_size(described['bytes'])}",
    }
    if described["labels"]:
        lines["labels"] = ", ".join(described["labels"][:20])
    for split, metrics in (metadata.get("metrics") or {}).items():
        shown = [f"{name} {' '.join(figure(value)).strip()}" for name, value in metrics.items()]
        lines[f"on {split}"] = "; ".join(shown)
    if metadata.get("command"):
        lines["repeat"] = metadata["command"]
    width = max(map(len, lines))
    for name, text in lines.items():
        out.line(f"{name.ljust(width)}  {printable(str(text))}")


def show_learnt(out: Output, described: dict[str, Any], *, modules: bool) -> None:
    if not modules:
        shown = table("layer", "modules", "parameters", "norm", numbers=("modules", "parameters", "norm"), title=" ")
        for layer in described["layers"]:
            row = (str(layer["modules"]), f"{layer['parameters']:,}", f"{layer['norm']:.3g}")
            shown.add_row(printable(layer["layer"]), *row)
        out.show(shown)
        return
    numbers = ("parameters", "norm", "rank", "stable rank")
    shown = table("module", "what", *numbers, numbers=numbers, title=" ")
    for one in described["learnt"]:
        rank = "" if one["rank"] is None else str(one["rank"])
        stable = "" if one["stable_rank"] is None else f"{one['stable_rank']:.2f}"
        name = printable(one["module"]) or "input embeddings"
        shown.add_row(name, one["what"], f"{one['parameters']:,}", f"{one['norm']:.3g}", rank, stable)
    out.show(shown)
