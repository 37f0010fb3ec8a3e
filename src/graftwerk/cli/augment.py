"""`graftwerk augment`: further training rows, made from rows or by a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import DryRun
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table

Given = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value ...]",
        help="A run file with data.augment, and settings in place of those in it; or, with --by, settings of the "
        "augmenter, for instance probability=0.2 n=2.",
        show_default=False,
    ),
]


def augment(
    out: Output,
    given: Given = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A file of rows, in place of a run file.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="word-dropout, word-shuffle, word-insertion, back-translation or forward-translation.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--out", help="The .jsonl file to make; default: where the run looks.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an unfinished file; use a finished one as it is.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever is there.")] = False,
    dry_run: DryRun = False,
) -> Result:
    """Make further training rows by noise on words, or by letting a model translate.

    The rows go into a file of their own, each with its origin; the real rows stay as they are. Examples:

    graftwerk augment run.yaml --dry-run

    graftwerk augment --data rows.jsonl --by word-dropout probability=0.1 n=2 --out rows.dropped.jsonl

    graftwerk augment --data rows.jsonl --by back-translation model=runs/de-en tag='<BT>' --out rows.bt.jsonl
    """
    from graftwerk.augmentation.augment import augment
    from graftwerk.display import Rows

    with Rows("texts written", quiet=out.quiet) as rows:
        made: Any = augment(
            **read_given(given or [], data, by),
            out=to,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=rows,
        )
    if isinstance(made, dict):
        shown = table("augmenter", "reads", "writes", "variants at most", numbers=("variants at most",))
        for one in made["augmenters"]:
            shown.add_row(one["name"], printable(one["reads"]), printable(one["writes"]), f"{one['variants']:,}")
        out.show(shown)
        out.line(f"\n{made['rows']:,} rows; would be written to {made['file']}")
        return made
    if made.found:
        out.note("the file was there already, and is exactly what was asked for")
    for sentence in made.sentences():
        out.line(sentence)
    out.line(str(made.path))
    return dict(made.to_dict())


def read_given(given: list[str], data: str | None, by: str | None) -> dict[str, Any]:
    """Return the arguments of `augment` from the words of a command.

    Raises:
        ConfigError: a run file and --data, --by without --data, or something that is not of the form key=value.
    """
    from graftwerk.config import parse_overrides
    from graftwerk.errors import ConfigError

    files = [word for word in given if "=" not in word]
    settings = parse_overrides([word for word in given if "=" in word])
    if len(files) > 1:
        raise ConfigError(f"one run file at a time, not {', '.join(files)}")
    if files and (data is not None or by is not None):
        raise ConfigError(
            f"{files[0]} is a run file, which says itself which rows are augmented and how: data.train, data.augment",
            hint="leave out --data and --by, or the run file",
        )
    if files:
        return {"config": Path(files[0]), **settings}
    if data is None or by is None:
        raise ConfigError(
            "give a run file, or both --data and --by",
            hint="graftwerk augment run.yaml; graftwerk augment --data rows.jsonl --by word-dropout --out more.jsonl",
        )
    tree: dict[str, Any] = {"name": by}
    for key, value in settings.items():  # through.model=... is a setting of a setting
        *above, last = key.split(".")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"`{name}` has no keys of its own, so `{key}` cannot be set", where=key)
        node[last] = value
    return {"data": data, "by": tree}
