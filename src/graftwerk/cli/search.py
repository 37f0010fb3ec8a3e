"""`graftwerk search`: better settings for a method, judged on rows that no trial has seen."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwerk.cli.arguments import ConfigFile, Several
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.formatting import count

Given = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[trials=20] [seconds=600] [sampler=tpe] [workers=2] [key=a..b] [key=a,b] [key=value ...]",
        help="The budget; the sampler (tpe, random, grid); trials at once; pruner=median (or wilcoxon, none); "
        "finalists=3 and repeats=3: how many of the best trials are trained again, and with how many fresh seeds. "
        "learning_rate=1e-4..1e-2 and r=4,8,16 are axes that replace those of the method's own space or add to "
        "them; a single value fixes a setting.",
        show_default=False,
    ),
]


def search(
    out: Output,
    options: Several,
    config: ConfigFile,
    settings: Given = None,
) -> Result:
    """Search for better settings of the run's method.

    Trials see only training and validation rows. The best few are then trained again with fresh seeds, and one
    is compared with the defaults on the test rows. The same command again resumes; a larger budget adds trials.
    The folder of the search is output_dir; best.yaml in it is a run file.
    """
    from graftwerk.config import parse_overrides
    from graftwerk.experiments.axes import as_list

    given = parse_overrides([*map(as_list, settings or []), *(f"metric={name}" for name in [options.metric] if name)])
    if options.dry_run:
        return show_plan(out, config, given)
    from graftwerk.experiments.search.search import search

    found = search(config, quiet=out.quiet, **{**options.given(), **given})
    out.line(str(found))
    out.line(f"\n{found.report}\n{found.folder / 'best.yaml'}\n{found.folder}")
    return found.to_dict()


def show_plan(out: Output, config: Any, given: dict[str, Any]) -> Result:
    """Show the space and the cost of a search, checked as far as possible without loading a model's weights."""
    from graftwerk.cli.doctor import describe_cost
    from graftwerk.experiments.preflight import preflight
    from graftwerk.experiments.search.driver import require_rows
    from graftwerk.experiments.search.journal import require_optuna
    from graftwerk.experiments.search.search import read_search
    from graftwerk.experiments.search.space import default_settings, grid, value_text
    from graftwerk.training.data_checks import raise_on_severe

    require_optuna()
    base, axes, wanted, notes = read_search(config, given)
    checked = preflight(base)
    require_rows(checked["data"]["rows"])
    defaults = default_settings(base, axes)
    shown = table("setting", "searched", "default", numbers=("default",))
    for axis in axes:
        shown.add_row(axis.key, str(axis), value_text(defaults[axis.key]))
    out.show(shown)
    points = len(grid(axes)) if wanted.sampler == "grid" else None
    trials = min(filter(None, (wanted.most, points)), default=None)
    finals = (wanted.finalists + 1) * wanted.repeats
    budget = " or ".join(
        filter(None, [f"{trials} trials" if trials else "", f"{wanted.seconds:g} s" if wanted.seconds else ""])
    )
    rows = ", ".join(f"{number:,} {name}" for name, number in checked["data"]["rows"].items())
    out.line(
        f"\n{budget} ({wanted.sampler}, pruning: {wanted.pruner}, {wanted.workers} at once), then {finals} runs: "
        f"{wanted.finalists} finalists and the defaults with {wanted.repeats} fresh seeds each; rows: {rows}"
    )
    plan, runs = checked["plan"], (trials or 0) + finals
    seconds = None
    if "why_not" not in plan:
        each = plan["time"]["training_seconds"] / wanted.workers
        seconds = each * finals + min(filter(None, [each * trials if trials else None, wanted.seconds]))
    out.line(describe_cost(plan, seconds) + ("" if wanted.workers == 1 else f" for each of {wanted.workers} at once"))
    out.line(f"one run at the defaults: {count(checked['steps'])} steps of {checked['rows_per_step']} rows")
    for note in notes:
        out.warn(f"note: {printable(note)}")
    for finding in checked["findings"]:
        out.warn(f"{'SEVERE' if finding['grave'] else 'note'}: {printable(finding['message'])}")
    raise_on_severe(checked["findings"], checked["allowed"])
    return {
        "dry_run": True,
        "space": [axis.to_dict() for axis in axes],
        "defaults": defaults,
        "budget": {**wanted.model_dump(mode="json"), "trials": trials},
        "runs": runs,
        "steps": checked["steps"],
        "notes": notes,
        **{key: checked[key] for key in ("data", "findings", "output_dir", "plan")},
    }
