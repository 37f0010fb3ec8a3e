"""`graftwerk compare`: methods side by side on the user's data."""

from __future__ import annotations

import typer

from graftwerk.cli.command import Result, command
from graftwerk.cli.output import Output


def register(app: typer.Typer) -> None:
    pass
