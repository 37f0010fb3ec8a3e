"""`graftwerk schema`: every key of a run file."""

from __future__ import annotations

import typer

from graftwerk.cli.command import Result, command
from graftwerk.cli.output import Output, table


def register(app: typer.Typer) -> None:
    """Add the command `schema` to the app."""

    @command(app, "schema")
    def schema(out: Output) -> Result:
        """List every key of a run file with its default and meaning; with --json, its JSON schema."""
        from graftwerk.schema import run_keys, run_schema

        shown = table("key", "default", "kind", "meaning")
        for key in run_keys():
            default = "required" if key["required"] else "null" if key["default"] is None else str(key["default"])
            shown.add_row(key["key"], default, key["kind"], key["meaning"])
        if not out.as_json:
            out.show(shown)
        return run_schema()
