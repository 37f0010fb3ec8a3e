"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="A run file; `graftwerk schema` lists its keys.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="Settings in place of those in the file, for instance training.seed=1 method.r=16.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done; load and train nothing.")
]
RunOrAdapter = Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")]
