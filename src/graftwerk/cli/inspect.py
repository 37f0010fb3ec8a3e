"""`graftwerk inspect`: what is in an adapter folder, through the gate for foreign files; with --verify, on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.formatting import byte_size, count, figure


def inspect(
    out: Output,
    target: Annotated[Path, typer.Argument(metavar="ADAPTER_OR_RUN", help="An adapter folder or a run folder.")],
    modules: Annotated[bool, typer.Option("--modules", help="One line per module instead of one per layer.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Load the base, and compare each tensor with its digest before training."),
    ] = False,
    model: Base = None,
) -> Result:
    """Show what an adapter touches, holds and learnt, and where it comes from.

    No model is loaded except with --verify, which checks that the adapter's files are as they were written, and
    that the base is, bit for bit, what it was before training.

    Raises:
        ConfigError: `--model` without `--verify`.
    """
    if model is not None and not verify:
        raise ConfigError("--model names the base that --verify loads", hint="add --verify, or leave --model out")
    folder = adapter_in(target)
    from graftwerk.inspection.adapter import describe_adapter

    described = describe_adapter(folder)
    show_origin(out, described)
    show_learnt(out, described, modules=modules)
    if verify:
        from graftwerk.inspection.verify import verify as check

        out.note("loading the base, and reading all of its tensors ...")
        described["verified"] = checked = check(target, model=model)
        show_verified(out, checked)
    return described


def adapter_in(target: Path) -> Path:
    """Return the adapter folder: the given one, or the one in a run folder.

    Raises:
        ConfigError: there is no such folder, or it is a run without an adapter, or a comparison.
    """
    inner = target / "adapter"
    if (inner / "adapter_config.json").is_file():
        return inner
    if not target.is_dir():
        raise ConfigError(f"there is no folder {target}", hint="give a run folder or an adapter folder")
    if (target / "adapter_config.json").is_file():
        return target
    if (target / "manifest.json").is_file():
        raise ConfigError(f"the run in {target} has no adapter yet", hint="resume it: graftwerk train ... --resume")
    if (target / "comparison.json").is_file():
        runs = sorted(path.parent.name for path in target.glob("*/manifest.json"))
        raise ConfigError(
            f"{target} holds a comparison, not one adapter",
            hint=f"name one of its runs: {', '.join(str(target / run) for run in runs[:5])}",
        )
    return target  # the gate says what is wrong with it


def show_origin(out: Output, described: dict[str, Any]) -> None:
    """Show method, settings, base, labels and metrics of an adapter, as `describe_adapter` returns them."""
    base, metadata, method = described["base"], described["metadata"], described["method"]
    foreign = "name" not in method  # the method's settings are then those of PEFT
    lines = {
        "adapter": described["folder"],
        "method": described["peft_type"] if foreign else f"{method['name']} (PEFT type {described['peft_type']})",
        "settings": settings_of(method),
        "base": base["name"] or "not recorded",
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
        if text:
            out.line(f"{name.ljust(width)}  {printable(str(text))}")


def show_verified(out: Output, checked: dict[str, Any]) -> None:
    """Show what `verify` returned.

    Raises:
        IntegrityError: The base is not what it was before training.
    """
    for note in checked["notes"]:
        out.note(note)
    if checked["files"]:
        out.line(f"as they were written: {', '.join(checked['files'])}")
    if checked["unchanged"] is False:
        changed = checked["changed"] or checked["changed_in_training"]
        names = ", ".join(changed[:10]) + (", ..." if len(changed) > 10 else "")
        when = "is not what it was before training" if checked["changed"] else "was changed by the training itself"
        raise IntegrityError(
            f"the base {when}: {names} ({len(changed)} of {checked['tensors']} tensors)",
            hint="use the base that the run was trained on"
            if checked["changed"]
            else "train again; an adapter must leave the base as it is",
        )
    if checked["unchanged"]:
        drawn = f"; {checked['drawn']} that no checkpoint holds are not compared" if checked["drawn"] else ""
        out.line(f"bit for bit what they were before training: {checked['tensors']} tensors of the base{drawn}")


def settings_of(method: dict[str, Any]) -> str:
    """Return a method's settings on one line, without empty or disabled ones: ``r 8, target_modules query value``."""
    said = []
    for key, value in method.items():
        if key == "name" or value in (None, [], {}, False, ""):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
        said.append(f"{key} {shown}".rstrip())
    return ", ".join(said)


def show_learnt(out: Output, described: dict[str, Any], *, modules: bool) -> None:
    """Show the number of parameters and the norm of the update, by layer or by module.

    Args:
        out: The command's output.
        described: An adapter as `describe_adapter` returns it.
        modules: True for one line per module, with ranks, instead of one per layer.
    """
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
