"""`graftwerk schema`: the keys of a run file."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Annotated, Any

import typer

from graftwerk.cli.command import Result
from graftwerk.cli.output import Output
from graftwerk.display import PLAIN_WIDTH


def schema(
    out: Output,
    prefix: Annotated[
        str | None,
        typer.Argument(
            metavar="[PREFIX]",
            help="Only a part: `data`, `training.save`, `method.lora`, `method.r` (of every method).",
            show_default=False,
        ),
    ] = None,
) -> Result:
    """List the keys of a run file with their defaults and meanings.

    With --json: its JSON schema; of a part, the list of its keys.
    """
    from graftwerk.schema import keys_below, run_keys, run_schema

    keys = list(run_keys()) if prefix is None else keys_below(prefix)
    if not out.as_json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
        for key in keys:
            out.line(describe(key, width))
    return run_schema() if prefix is None else {"keys": keys}


def describe(key: dict[str, Any], width: int) -> str:
    """Return a key with its default and kind in a line, and its meaning below, in lines not broken within words."""
    default = "required" if key["required"] else "null" if key["default"] is None else str(key["default"])
    layout: dict[str, Any] = {"width": max(width, 20), "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(f"{key['key']}: {default}  ({key['kind']})", subsequent_indent="        ", **layout)
    meaning = textwrap.wrap(key["meaning"], initial_indent="    ", subsequent_indent="    ", **layout)
    return "\n".join([*lines, *meaning])
