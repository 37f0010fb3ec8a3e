"""`graftwerk report`: the page of a run or a comparison, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwerk.cli.command import Result
from graftwerk.cli.output import Output


def report(
    out: Output,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a comparison.")],
) -> Result:
    """Write report.html from the files of a run or a comparison; no model is loaded."""
    from graftwerk.reporting.html import write_report

    path = write_report(run)
    out.line(str(path))
    return {"report": path}
