"""`graftwerk predict`: what a trained adapter says about texts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Columns, Force, RunOrAdapter, columns_of, evaluation_of
from graftwerk.cli.command import Result, command
from graftwerk.cli.output import Output, printable

TEXTS = ("text", "text_pair", "anchor", "positive")
"""Fields of an answer that show what was asked."""


def register(app: typer.Typer) -> None:
    """Add the command `predict` to the app."""

    @command(app, "predict")
    def predict(
        out: Output,
        target: RunOrAdapter,
        texts: Annotated[
            list[str] | None, typer.Argument(metavar="[TEXT ...]", help="The texts.", show_default=False)
        ] = None,
        data: Annotated[str | None, typer.Option(help="A file of rows, in place of texts.", show_default=False)] = None,
        column: Columns = None,
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
        """Label texts with a trained adapter.

        One line each, separated by tabs: the label and its probability, the labels, the score or the entities, then the
        text; of a
        task that writes, the answer alone.
        """
        from graftwerk.cli.progress import Rows
        from graftwerk.errors import ConfigError
        from graftwerk.evaluation.evaluate import predict

        if bool(texts) == bool(data):
            raise ConfigError(
                "give texts or --data, not both" if texts else "there is nothing to predict",
                hint='graftwerk predict RUN "some text", or graftwerk predict RUN --data rows.csv',
            )
        with Rows(out, "predicting") as rows:
            result = predict(
                target,
                texts or None,
                data,
                columns=columns_of(column),
                model=model,
                force=force,
                evaluation=evaluation_of(settings),
                on_progress=rows,
            )
        for place, row in enumerate(result["predictions"]):
            if "output" in row:
                out.answer(printable(row["output"]))
                continue
            shown = texts[place].split("\t") if texts else [row[part] for part in TEXTS if part in row]
            shown = shown or [" ".join(row["tokens"])]
            out.answer("\t".join([*_cells(row), *map(printable, shown)]))
        for note in result["notes"]:
            out.warn(f"note: {note}")
        return result


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
