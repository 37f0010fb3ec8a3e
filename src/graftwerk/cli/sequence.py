"""`graftwerk sequence`: tasks one after the other, and what each costs the ones before it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile, DryRun
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[seeds=0,1,2] [variants=A,B] [key=value ...]",
        help="The seeds, the variants to train (default: all in the file), and settings in place of those in the file.",
        show_default=False,
    ),
]


def sequence(
    out: Output,
    config: ConfigFile,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train everything again.")] = False,
    dry_run: DryRun = False,
) -> Result:
    """Learn tasks one after the other, and measure after each how much of the earlier ones is retained.

    The file has `tasks` (and optionally `variants`) in addition to the keys of a run file. The same command again
    resumes where it stopped. The folder of the sequence is output_dir.
    """
    from graftwerk.config import parse_overrides

    overrides = parse_overrides(settings)
    seeds, variants = overrides.pop("seeds", "0,1,2"), overrides.pop("variants", None)
    if dry_run:
        return _show_plan(out, config, seeds, variants, overrides)
    from graftwerk.experiments.sequence.sequence import sequence

    found = sequence(config, seeds, variants=variants, overwrite=overwrite, quiet=out.quiet, **overrides)
    out.line(found.table())
    out.line(f"\n{found.report}\n{found.folder}")
    return found.to_dict()


def _show_plan(out: Output, config: Any, seeds: Any, variants: Any, overrides: dict[str, Any]) -> Result:
    """Show the runs, checked as far as possible without loading a model's weights."""
    from graftwerk.cli.compare import show_runs
    from graftwerk.config import RunConfig
    from graftwerk.experiments.method_specs import parse_seeds
    from graftwerk.experiments.sequence.driver import alone
    from graftwerk.experiments.sequence.plan import read_plan

    names = [part.strip() for part in variants.split(",")] if isinstance(variants, str) else variants
    plan, numbers = read_plan(config, overrides, names), parse_seeds(seeds)
    shown = {}
    for place, task in enumerate(plan.tasks):
        for variant in plan.variants:
            plan.config_of(variant, numbers[0], place)
        configs = {
            variant.name: RunConfig.build(alone(plan.config_of(variant, numbers[0], place)))
            for variant in plan.variants
        }
        count = len(plan.variants) * len(numbers)
        shown[task] = show_runs(out, configs, len(numbers), f"task {place + 1}, {task}: {count} runs")
    return {"dry_run": True, "seeds": numbers, "variants": [each.name for each in plan.variants], "tasks": shown}
