"""`graftwerk merge`, `export` and `push`: an adapter handed over, compared with its export first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, Force, RunOrAdapter, columns_of
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output
from graftwerk.formatting import byte_size

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write: new or empty.")]
AllowForgetting = Annotated[
    bool, typer.Option("--allow-forgetting", help="Hand over a run that has forgotten more than it allows.")
]


@dataclass(frozen=True)
class Checked:
    """Options of the commands that compare what they write with the adapter."""

    data: Annotated[
        str | None, typer.Option(help="Rows to compare on; default: the run's own held-out rows.", show_default=False)
    ] = None
    column: Columns = None
    rows: Annotated[int, typer.Option(help="Number of rows to compare.")] = 32
    model: Base = None
    force: Force = False
    max_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference",
            help="Largest difference of probabilities that is accepted; default: what rounding explains, 1e-4 in "
            "float32.",
            show_default=False,
        ),
    ] = None
    allow_forgetting: AllowForgetting = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in the folder.")] = False

    def given(self) -> dict[str, Any]:
        """Return the options as arguments in Python."""
        options = dict(vars(self))
        return {"columns": columns_of(options.pop("column")), **options}


def merge(
    out: Output,
    options: Checked,
    target: RunOrAdapter,
    folder: Out,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto (the base's), float32, bfloat16, float16.")
    ] = "auto",
) -> Result:
    """Merge an adapter into its base: a folder that plain transformers loads.

    The merged model is loaded again and compared with the adapter on real rows; one that answers otherwise is not
    written.
    """
    from graftwerk.exports.merge import merge

    out.note("loading the adapter, merging, and comparing ...")
    result = merge(target, folder, dtype=dtype, **options.given())  # type: ignore[arg-type]  # checked there
    _show(out, result, f"{byte_size(result['bytes'])} in {result['dtype']}")
    out.note(f'use it: AutoModel...from_pretrained("{result["out"]}"); README.md there has the lines')
    return result


def export(
    out: Output,
    options: Checked,
    target: RunOrAdapter,
    folder: Out,
    to: Annotated[str, typer.Option(help="peft, vllm, gguf (llama.cpp and Ollama) or merged.", show_default=False)],
    base_name: Annotated[
        str | None,
        typer.Option(help="Name of the base in the folder, such as its hub id: org/model.", show_default=False),
    ] = None,
) -> Result:
    """Write an adapter for another program: PEFT, vLLM, or llama.cpp and Ollama.

    The export is loaded again and compared with the adapter on real rows; one that answers otherwise is not
    written.
    """
    from graftwerk.exports.export import export

    out.note("loading the adapter, exporting, and comparing ...")
    result = export(
        target,
        folder,
        to=to,  # type: ignore[arg-type]  # checked there
        base_name=base_name,
        **options.given(),
    )
    _show(out, result, byte_size(result["bytes"]))
    out.note(f"use it: {result['command']}")
    return result


def push(
    out: Output,
    target: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run or adapter, or a folder that merge or export wrote.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, and write to one that is.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Title of the commit.", show_default=False)
    ] = None,
    allow_forgetting: AllowForgetting = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files; send nothing.")] = False,
) -> Result:
    """Upload a finished folder to the hub, in one commit; a new repository is private.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    from graftwerk.exports.push import push

    if not dry_run:
        out.note(f"checking the files, and sending them to {repo} ...")
    result = push(target, repo, private=not public, message=message, allow_forgetting=allow_forgetting, dry_run=dry_run)
    for file in result["files"]:
        out.note(f"{byte_size(file['bytes']):>10}  {file['name']}")
    for note in result["notes"]:
        out.note(note)
    total = f"{result['kind']}, {len(result['files'])} files, {byte_size(result['bytes'])}"
    out.line(f"{total}: nothing was sent" if dry_run else str(result["url"]))
    return result


def _show(out: Output, result: dict[str, Any], size: str) -> None:
    parity = result["parity"]
    for note in result["notes"]:
        out.note(note)
    out.note(
        f"largest difference of probabilities {parity['max_abs_difference']:.2g}, "
        f"{100 * parity['agreement']:.1f} % of the likeliest answers agree; {size}"
    )
    out.line(str(result["out"]))
