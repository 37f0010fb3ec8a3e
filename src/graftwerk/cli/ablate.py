"""`graftwerk ablate`: one method with several values of its settings, on the user's data."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile, DryRun
from graftwerk.cli.command import Result, command
from graftwerk.cli.compare import Margin, Metric, Prefer, show_runs
from graftwerk.cli.output import Output

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="method.KEY=A,B,... [seeds=0,1,2] [design=grid|one-at-a-time] [vary=split] [key=value ...]",
        help="What to vary: settings of the method or of the training with several values; then the seeds; whether all "
        "combinations or one change at a time; and settings in place of those in the file. A value that is a list "
        "itself stands in a list: method.target_modules='[[q_proj], [q_proj, v_proj]]'.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command `ablate` to the app."""

    @command(app, "ablate")
    def ablate(
        out: Output,
        config: ConfigFile,
        settings: Settings = None,
        metric: Metric = None,
        prefer: Prefer = None,
        margin: Margin = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Train all of it again.")] = False,
        dry_run: DryRun = False,
    ) -> Result:
        """Train the run file's method with several values of its settings, and show what each setting does.

        Every combination trains with each seed on the same rows; differences come with paired intervals. The same
        command again resumes where it stopped. The folder is output_dir.
        """
        from graftwerk.experiments.arguments import check_vary

        axes, seeds, design, overrides = read_settings(settings or [])
        vary = check_vary(str(overrides.pop("vary", "training")))
        if dry_run:
            return _show_plan(out, config, axes, seeds, design, overrides, metric, prefer, margin)
        from graftwerk.experiments.ablate import ablate

        chosen: dict[str, Any] = {} if prefer is None else {"prefer": prefer}
        found = ablate(
            config, axes, seeds, design=design,
            vary=vary, overwrite=overwrite, metric=metric, margin=margin, quiet=out.quiet,
            **chosen, **overrides,
        )  # fmt: skip
        if sys.stdout.isatty() and not out.as_json:
            out.show(found)
        else:
            out.line(found.table())
        out.line(f"\n{found.report}\n{found.folder}")
        return found.to_dict()


def read_settings(given: list[str]) -> tuple[dict[str, Any], Any, str, dict[str, Any]]:
    """Separate axes, ``seeds=`` and ``design=`` from the settings of the run file.

    Returns:
        The axes, the seeds, the design, and the other overrides.

    Raises:
        ConfigError: Something is not of the form key=value, or given twice.
    """
    from graftwerk.config import parse_overrides

    axes: dict[str, Any] = {}
    overrides = parse_overrides(given)
    seeds, design = overrides.pop("seeds", "0,1,2"), overrides.pop("design", "grid")
    for key, value in list(overrides.items()):
        nested = isinstance(value, list) and any(isinstance(each, list) for each in value)
        if (isinstance(value, str) and "," in value) or nested:
            axes[key] = overrides.pop(key)
    return axes, seeds, str(design), overrides


def _show_plan(
    out: Output,
    config: Any,
    axes: dict[str, Any],
    seeds: Any,
    design: str,
    overrides: dict[str, Any],
    metric: str | None,
    prefer: str | None,
    margin: float | None,
) -> Result:
    """Show the cells, checked as far as possible without loading a model's weights."""
    from graftwerk.experiments.ablate import opened
    from graftwerk.experiments.arguments import check_choices
    from graftwerk.experiments.method_specs import parse_seeds

    base, ablation = opened(config, axes, design, overrides)
    numbers = parse_seeds(seeds)
    check_choices(base, metric, prefer, margin)
    tree = base.model_dump(mode="json")
    configs = {cell.spec.name: base.build(tree, dict(cell.values)) for cell in ablation.cells}
    found = show_runs(out, configs, len(numbers), ablation.planned(numbers))
    axes = {key: list(values) for key, values in ablation.axes.items()}
    return {"dry_run": True, "axes": axes, "seeds": numbers, **found}
