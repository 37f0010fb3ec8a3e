"""`graftwerk report`: the page of a run or a comparison, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwerk.cli.command import Result, command
from graftwerk.cli.output import Output


def register(app: typer.Typer) -> None:
    """Add the command `report` to the app."""

    @command(app, "report")
    def report(
        out: Output,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a comparison.")],
    ) -> Result:
        """Write report.html from the files of a run or a comparison; no model is loaded."""
        from graftwerk.reporting.html import write_report

        path = write_report(run)
        out.line(str(path))
        return {"report": path}
