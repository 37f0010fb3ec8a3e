"""`graftwerk ablate`: one method with several values of its settings, on the user's data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import Compared, ConfigFile
from graftwerk.cli.command import Result
from graftwerk.cli.compare import show_comparison, show_runs
from graftwerk.cli.output import Output

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="method.KEY=A,B,... [seeds=0,1,2] [design=grid|one-at-a-time] [vary=split] [key=value ...]",
        help="What to vary: settings of the method or of the training with several values; then the seeds; whether all "
        "combinations or one change at a time; and settings in place of those in the file. A value may be a list "
        "itself: 'method.target_modules=[q_proj],[q_proj, v_proj]'.",
        show_default=False,
    ),
]


def ablate(
    out: Output,
    options: Compared,
    config: ConfigFile,
    settings: Settings = None,
) -> Result:
    """Train the run file's method with several values of its settings, and show what each setting does.

    Every combination trains with each seed on the same rows; differences come with paired intervals. The same
    command again resumes where it stopped. The folder is output_dir.
    """
    from graftwerk.experiments.arguments import check_vary

    axes, seeds, design, overrides = read_settings(settings or [])
    vary = check_vary(str(overrides.pop("vary", "training")))
    if options.dry_run:
        return _show_plan(out, config, axes, seeds, design, overrides, options)
    from graftwerk.experiments.ablate import ablate

    own: dict[str, Any] = {"design": design, "vary": vary, "quiet": out.quiet}
    return show_comparison(out, ablate(config, axes, seeds, **own, **options.given(), **overrides))


def read_settings(given: list[str]) -> tuple[dict[str, Any], Any, str, dict[str, Any]]:
    """Separate axes, ``seeds=`` and ``design=`` from the settings of the run file.

    Returns:
        The axes, the seeds, the design, and the other overrides.

    Raises:
        ConfigError: Something is not of the form key=value, or given twice.
    """
    from graftwerk.config import parse_overrides
    from graftwerk.experiments.axes import as_list

    axes: dict[str, Any] = {}
    overrides = parse_overrides([as_list(item) for item in given])
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
    options: Compared,
) -> Result:
    """Show the cells, checked as far as possible without loading a model's weights."""
    from graftwerk.experiments.ablate import read_cells
    from graftwerk.experiments.arguments import check_choices
    from graftwerk.experiments.method_specs import parse_seeds

    base, ablation = read_cells(config, axes, design, overrides)
    numbers = parse_seeds(seeds)
    check_choices(base, options.metric, options.prefer, options.margin)
    tree = base.model_dump(mode="json")
    configs = {cell.spec.name: base.build(tree, dict(cell.values)) for cell in ablation.cells}
    found = show_runs(out, configs, len(numbers), ablation.planned(numbers))
    axes = {key: list(values) for key, values in ablation.axes.items()}
    return {"dry_run": True, "axes": axes, "seeds": numbers, **found}
