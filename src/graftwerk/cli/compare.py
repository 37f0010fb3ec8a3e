"""`graftwerk compare`: methods side by side on the user's data."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    pass
