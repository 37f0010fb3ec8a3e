"""Arguments that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwerk.errors import ConfigError

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
EvaluationOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="Settings of `evaluation:` in place of the run file's, for instance num_beams=4 max_new_tokens=40.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done; load and train nothing.")
]
RunOrAdapter = Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="PART=NAME", help="What a column of --data is called: text=review.", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--model", help="The base model, if it is not where the adapter says.", show_default=False),
]
Force = Annotated[
    bool, typer.Option("--force", help="Accept a base whose weights differ from those the adapter was trained on.")
]
Metric = Annotated[str | None, typer.Option(help="Metric that decides; default: the task's own.", show_default=False)]


@dataclass(frozen=True)
class Several:
    """Options of the commands that make several runs."""

    metric: Metric = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train everything again; what earlier runs left is replaced.")
    ] = False
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT|local",
            help="Train on a Ray cluster, as many runs at once as fit: auto is the one this machine belongs to, "
            "HOST:PORT the one whose head is there, local one of this machine alone.",
            show_default=False,
        ),
    ] = None
    resources: Annotated[
        str | None,
        typer.Option(
            metavar="CPU=1[,GPU=1]",
            help="What a run takes of the cluster; default: one CPU, and one GPU if there are any.",
            show_default=False,
        ),
    ] = None
    dry_run: DryRun = False

    def __post_init__(self) -> None:
        if self.dry_run and self.ray is not None:
            hint = "leave out --ray; the time shown is that of one run after another"
            raise ConfigError("a dry run asks no Ray cluster", where="--ray", hint=hint)

    def given(self) -> dict[str, Any]:
        """Return the options as arguments in Python; what was left out has its default there."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "dry_run"}


@dataclass(frozen=True)
class Compared(Several):
    """Options of the commands that compare."""

    prefer: Annotated[
        str | None,
        typer.Option(help="The cost that decides among equals; default: trained_parameters.", show_default=False),
    ] = None
    margin: Annotated[
        float | None,
        typer.Option(
            help="Distance within which methods are practically equal, in the metric's own unit: 0.01 is a point of "
            "accuracy; default: a point, or 1 % of the best.",
            show_default=False,
        ),
    ] = None


def columns_of(given: list[str] | None) -> dict[str, str] | None:
    """Parse `["text=review"]` to `{"text": "review"}`.

    Raises:
        ConfigError: one is not of that form.
    """
    if not given:
        return None
    columns = {}
    for item in given:
        part, equals, name = item.partition("=")
        if not (part and equals and name):
            raise ConfigError(
                f"`--column {item}` is not of the form part=name", hint="for instance --column text=review"
            )
        if part in columns:
            raise ConfigError(f"`--column` names the part `{part}` twice", hint="give one of them")
        columns[part] = name
    return columns


def evaluation_of(given: list[str] | None) -> dict[str, Any]:
    """Parse `["num_beams=4", "evaluation.baseline=true"]` to `{"num_beams": 4, "baseline": True}`.

    Raises:
        ConfigError: one is not of that form, or belongs to the training.
    """
    from graftwerk.config import parse_overrides

    settings = {}
    for key, value in parse_overrides(list(given or ())).items():
        section, dot, name = key.rpartition(".")
        if dot and section != "evaluation":
            raise ConfigError(
                f"`{key}` is settled by the training; only settings of `evaluation:` can change", where=key
            )
        if name in settings:
            raise ConfigError(f"`{name}` is set twice", where=key, hint="give one of them")
        settings[name] = value
    return settings
