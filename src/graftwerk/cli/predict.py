"""`graftwerk predict`: what a trained adapter says about texts, or about every row of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, Force, RunOrAdapter, columns_of, evaluation_of
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable
from graftwerk.errors import ConfigError

Answer = dict[str, Any]

TEXTS = ("text", "text_pair", "anchor", "positive")
"""Fields of an answer that show what was asked."""


def predict(
    out: Output,
    target: RunOrAdapter,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="The texts; - for lines of standard input.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows in place of texts: a txt, csv, tsv, jsonl or parquet file; - for lines of standard input.",
            show_default=False,
        ),
    ] = None,
    column: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .csv, .tsv, .jsonl or .parquet file for the rows with their answers.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the file of --output stops.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    model: Base = None,
    force: Force = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of `evaluation:` in place of the run file's: num_beams=4.",
            show_default=False,
        ),
    ] = None,
) -> Result:
    """Answer texts, or every row of a file, with a trained adapter.

    One line each, in order, separated by tabs: the label and its probability, the labels, the score or the
    entities, then the text; of a task that writes, the answer alone (a line for each of several). A row that cannot
    be answered (an empty cell, a broken line) has an empty answer, and is counted.

    Raises:
        ConfigError: Neither texts nor rows, or both; options for a file without `--output`.
    """
    if texts == ["-"] and not data:
        texts, data = None, "-"
    if bool(texts) == bool(data):
        raise ConfigError(
            "give texts or --data, not both" if texts else "there is nothing to predict",
            hint='graftwerk predict RUN "some text", or graftwerk predict RUN --data rows.csv',
        )
    if (resume or overwrite) and output is None:
        raise ConfigError("--resume and --overwrite are for the file of --output", hint="--output answers.csv")
    options: dict[str, Any] = {
        "columns": columns_of(column),
        "model": model,
        "force": force,
        "evaluation": evaluation_of(settings),
    }
    if data == "-" and sys.stdin.isatty():
        out.note("reading lines from the terminal; Ctrl-D ends them")
    if output is not None:
        return _to_file(out, target, data or texts, output, {**options, "resume": resume, "overwrite": overwrite})
    if data is not None:
        return _rows(out, target, data, options)
    return _texts(out, target, texts or [], options)


def _texts(out: Output, target: str, texts: list[str], options: Answer) -> Result:
    from graftwerk.evaluation.evaluate import predict

    result = predict(target, texts, quiet=out.quiet, **options)
    for text, answer in zip(texts, result["predictions"], strict=True):
        _show(out, answer, text.split("\t"))
    _warn(out, result["notes"])
    return result


def _rows(out: Output, target: str, data: str, options: Answer) -> Result:
    """Answer the rows of a source on stdout as they are read; with `--json` together at the end."""
    from graftwerk.display import Rows
    from graftwerk.evaluation.stream import predict_stream

    # On a terminal the answers are the progress.
    watched = out.as_json or not sys.stdout.isatty()
    answers: list[Answer] = []
    with Rows("predicting", quiet=out.quiet) if watched else nullcontext() as rows:
        stream = predict_stream(target, data=data, on_progress=_flushing(rows), **options)
        for answer in stream:
            own = answer.pop("row")
            if out.as_json:
                answers.append({key: value for key, value in answer.items() if key != "reason" or value is not None})
            else:
                parts = [answer.get(part, own.get(part)) for part in TEXTS]
                shown = [str(part) for part in parts if part is not None]
                _show(out, answer, shown or [" ".join(answer.get("tokens", ()))])
    _warn(out, stream.notes)
    return {"predictions": answers, "notes": stream.notes}


def _flushing(rows: Callable[[int, int | None], None] | None) -> Callable[[int, int | None], None]:
    """Hand on what is printed with every step of progress: a pipe would otherwise hold it back."""
    from graftwerk.cli.output import read

    def report(done: int, total: int | None) -> None:
        with read():
            sys.stdout.flush()
        if rows is not None:
            rows(done, total)

    return report


def _to_file(out: Output, target: str, data: str | list[str] | None, output: Path, options: Answer) -> Result:
    from graftwerk.evaluation.predict_file import predict_file

    result = predict_file(target, data or [], output, quiet=out.quiet, **options)
    _warn(out, result["notes"])
    out.line(result["output"])
    return result


def _show(out: Output, answer: Answer, texts: list[str]) -> None:
    text = "\t".join(map(printable, texts))
    if "output" in answer:
        several = answer["output"] if isinstance(answer["output"], list) else [answer["output"]]
        for one in several:
            out.answer(printable(one))
    elif answer.get("reason") is not None:
        out.answer(f"\t\t{text}".rstrip())
    else:
        out.answer("\t".join([*_cells(answer), text]))


def _warn(out: Output, notes: list[str]) -> None:
    for note in notes:
        out.warn(f"note: {note}")


def _cells(row: dict[str, Any]) -> list[str]:
    """Return an answer as the first columns of its line."""
    if "label" in row:
        return [printable(row["label"]), f"{max(row['scores'].values()):.3f}"]
    if "entities" in row:
        return [printable("; ".join(f"{each['label']}: {each['text']}" for each in row["entities"])) or "-"]
    if "labels" in row:
        return [printable(", ".join(row["labels"])) or "-"]
    if "embedding" in row:
        return [" ".join(f"{value:.6g}" for value in row["embedding"])]
    return [f"{row['score']:.4g}" if "score" in row else f"{row['similarity']:.4f}"]
