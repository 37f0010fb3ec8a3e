"""`graftwerk errors`: the held-out rows that a run answers wrongly, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table

SHOWN = 20
CUT = 160
"""Characters of a text in the table."""


def errors(
    out: Output,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    split: Annotated[
        str | None,
        typer.Option(help="test or validation; default: test if there are such rows.", show_default=False),
    ] = None,
    true: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Only rows of this label or entity type.", show_default=False),
    ] = None,
    predicted: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Only rows given this label or entity type.", show_default=False),
    ] = None,
    contains: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only rows with this in a text.", show_default=False)
    ] = None,
    confident: Annotated[bool, typer.Option("--confident", help="The most confident mistakes first.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Right rows too.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most rows; default: {SHOWN}, and all of them with --output.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .csv, .tsv or .jsonl file for the rows.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
) -> Result:
    """Show the held-out rows that a run answers wrongly, the worst first; no model is loaded.

    A run keeps its predictions of the test and validation rows. Tasks whose answers are not right or wrong show all
    rows, the largest errors first.

    Raises:
        ConfigError: `--overwrite` without `--output`.
    """
    from graftwerk.errors import ConfigError
    from graftwerk.evaluation.error_rows import read_errors, write_errors

    if overwrite and output is None:
        raise ConfigError("--overwrite is for the file of --output", hint="--output errors.csv")
    most = limit if limit is not None or output is not None else SHOWN
    result = read_errors(
        run,
        split=split,
        true=true,
        predicted=predicted,
        contains=contains,
        confident=confident,
        everything=everything,
        limit=most,
    )
    rows = result["predictions"]
    if output is not None:
        write_errors(output, rows, overwrite=overwrite)
        result = {**{key: value for key, value in result.items() if key != "predictions"}, "output": output}
    wrong = "" if result["wrong"] is None else f"{result['wrong']:,} wrong, "
    out.note(f"{result['split']}: {result['rows']:,} rows, {wrong}{result['matching']:,} match, {len(rows):,} shown")
    if output is not None:
        out.line(str(output))
    elif rows:
        _show(out, rows, str(result["error"]))
    return result


def _show(out: Output, rows: list[dict[str, Any]], error: str) -> None:
    from graftwerk.evaluation.error_rows import TEXTS

    columns = [name for name in ("row", "where", "true", "predicted", "error", "confidence") if name in rows[0]]
    headings = [error if name == "error" else name for name in columns]
    shown = table(*headings, "text", numbers=("row", error, "confidence"))
    for row in rows:
        texts = [printable(str(row[part])) for part in TEXTS if part in row]
        text = " | ".join(each if len(each) <= CUT else each[: CUT - 1] + "…" for each in texts)
        shown.add_row(*(_cell(name, row) for name in columns), text)
    out.show(shown)


def _cell(name: str, row: dict[str, Any]) -> str:
    """Return a value of a row as a cell; of entities, only those that the other side lacks."""
    value = row.get(name)
    if value is None:
        return ""
    if name == "where":
        return printable(str(value).replace("\\", "/").rpartition("/")[2])
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        other = row["predicted" if name == "true" else "true"]
        places = [_place(each) for each in other]
        kept = [each for each in value if not isinstance(each, dict) or _place(each) not in places]
        named = [f"{each['label']}: {each['text']}" if isinstance(each, dict) else str(each) for each in kept]
        return printable("; ".join(named)) or "-"
    text = printable(str(value))
    return text if len(text) <= CUT else text[: CUT - 1] + "…"


def _place(entity: Any) -> Any:
    return (entity["start"], entity["end"], entity["label"]) if isinstance(entity, dict) else entity
