"""`graftwerk init`: from a file of rows to a run file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.errors import ConflictError


def init(
    out: Output,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file of rows: csv, tsv, jsonl, parquet, txt.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; default: a small one.", show_default=False)
    ] = None,
    to: Annotated[Path, typer.Option("--out", help="The run file to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run file that is there.")] = False,
) -> Result:
    """Look at a file of rows, and write a commented run file for it.

    Delimiter, encoding, columns, the kind of label and the task are guessed, and each guess is said with its
    reason.

    Raises:
        ConflictError: The run file exists.
    """
    if to.exists() and not overwrite:
        raise ConflictError(f"{to} exists", where=str(to), hint="--overwrite replaces it; --out names another file")
    from graftwerk.experiments.first_run import first_run
    from graftwerk.serialization.atomic import write_file

    made = first_run(data, model=model)
    write_file(to, made["text"])
    columns = table("column", "filled", "different", "for instance", numbers=("filled", "different"))
    for name, column in made["columns"].items():
        example = printable(column["example"] or "")
        columns.add_row(printable(name), f"{column['filled']:,}", f"{column['distinct']:,}", example)
    guesses = table("guessed", "value", "because", title=f"\n{made['rows']:,} rows" if made["rows"] else " ")
    for guess in made["guesses"]:
        guesses.add_row(guess["key"], printable(str(guess["value"])), printable(guess["why"]))
    out.show(columns, guesses)
    out.note(f"next: graftwerk doctor {shlex.quote(str(to))}, then graftwerk train {shlex.quote(str(to))}")
    out.line(str(to))
    return {"out": str(to), **{key: value for key, value in made.items() if key != "text"}}
