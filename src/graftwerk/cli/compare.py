"""`graftwerk compare`: methods side by side on the user's data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwerk.cli.arguments import Compared, ConfigFile
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, printable, table
from graftwerk.formatting import count, share

if TYPE_CHECKING:
    from graftwerk.config import RunConfig
    from graftwerk.experiments.compare import Comparison

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="methods=A,B,... [seeds=0,1,2] [budget=4|10min] [augment=with,without] [vary=split] "
        "[learning_rate=1e-3,3e-3] [key=value ...]",
        help="What to compare: names, or a YAML list as in "
        "methods='[lora, {name: lora, r: 16, learning_rate: 5.0e-4}]'; then the seeds; "
        "what each method may spend on finding its settings (trials, or time for training); "
        "whether with and without the rows of data.augment; whether a seed draws training rows of its own; "
        "and settings in place of those in the file. Several values "
        "of a setting of the training are tried for each method, and chosen among on the validation rows.",
        show_default=False,
    ),
]


def compare(
    out: Output,
    options: Compared,
    config: ConfigFile,
    settings: Settings = None,
) -> Result:
    """Train and measure methods side by side, over several seeds.

    Each method trains at its own learning rate on the same rows; differences come with paired intervals. The same
    command again resumes where it stopped. The folder of the comparison is output_dir.
    """
    from graftwerk.experiments.arguments import check_vary

    methods, seeds, overrides = read_settings(settings or [])
    augment, budget = overrides.pop("augment", None), overrides.pop("budget", None)
    vary = str(overrides.pop("vary", "training"))
    if options.dry_run:
        check_vary(vary)
        return show_plan(out, config, methods, seeds, overrides, augment, budget, options)
    from graftwerk.experiments.compare import compare

    own: dict[str, Any] = {"augment": augment, "budget": budget, "vary": vary, "quiet": out.quiet}
    return show_comparison(out, compare(config, methods, seeds, **own, **options.given(), **overrides))


def show_comparison(out: Output, compared: Comparison) -> Result:
    """Show the table of a comparison and where it is."""
    if sys.stdout.isatty() and not out.as_json:
        out.show(compared)
    else:
        out.line(compared.table())
    out.line(f"\n{compared.report}\n{compared.folder}")
    return compared.to_dict()


def read_settings(given: list[str]) -> tuple[Any, str, dict[str, Any]]:
    """Separate ``methods=`` and ``seeds=`` from the settings of the run file.

    Raises:
        ConfigError: no methods; or something that is not of the form key=value.
    """
    from graftwerk.config import parse_overrides
    from graftwerk.errors import ConfigError
    from graftwerk.experiments.axes import as_list
    from graftwerk.yaml_files import parse_yaml

    methods: Any = None
    seeds = "0,1,2"
    own, others = list[str](), list[str]()
    for item in given:
        key, equals, value = item.partition("=")
        if equals and key in ("methods", "seeds") and sum(other.startswith(f"{key}=") for other in given) > 1:
            raise ConfigError(f"`{key}` is given twice", where=key, hint="give one of them")
        if key == "methods" and equals:
            methods = value
        elif key == "seeds" and equals:
            seeds = value.strip("[] ")
        elif key in ("augment", "budget", "vary") and equals:  # arguments of the comparison; not `data.augment`
            own.append(item)
        else:
            others.append(as_list(item))
    if methods is None:
        raise ConfigError("no methods are named", where="methods", hint="for instance methods=full,lora,bottleneck")
    if methods.lstrip().startswith(("[", "{")):
        try:
            methods = parse_yaml(methods.encode("utf-8", "surrogateescape"), "methods")
        except ConfigError as error:
            raise ConfigError(f"not YAML: {error.what}", where="methods") from None
        methods = [methods] if isinstance(methods, dict) else methods
    return methods, seeds, {**parse_overrides(others), **parse_overrides(own)}


def show_plan(
    out: Output,
    config: Any,
    methods: Any,
    seeds: str,
    overrides: dict[str, Any],
    augment: Any,
    budget: Any,
    options: Compared,
) -> Result:
    """Show the plan of a comparison, checked as far as possible without loading a model's weights."""
    from graftwerk.config import RunConfig
    from graftwerk.experiments.arguments import check_choices, refuse_overrides
    from graftwerk.experiments.budget import candidates, parse_budget
    from graftwerk.experiments.method_specs import parse_method_specs, parse_seeds, settings_not_used, with_and_without
    from graftwerk.experiments.tuning import planned_runs, read_axes, require_validation, tuned

    entries, numbers, allowed = parse_method_specs(methods), parse_seeds(seeds), parse_budget(budget)
    axes, overrides = read_axes(overrides)
    refuse_overrides(overrides)
    base = RunConfig.of(config, {"method": entries[0].method, **overrides})
    check_choices(base, options.metric, options.prefer, options.margin)
    given = with_and_without(entries, augment, bool(base.data.augment))
    if allowed is not None:
        for entry in given:
            candidates(entry, base, axes, allowed)
    entries = tuned(given, axes) if allowed is None else given
    configs = {
        entry.name: RunConfig.of(config, {"method": entry.method, **overrides, **entry.changes}) for entry in entries
    }
    timed = allowed.seconds or 0.0 if allowed is not None else 0.0
    runs = len(numbers) + (allowed.trials if allowed is not None and not timed else 0)
    found = show_runs(
        out,
        configs,
        runs,
        planned_runs(given, axes, numbers, allowed),
        require=lambda rows: require_validation(axes, rows, allowed),
        seconds=len(given) * timed,
        notes=settings_not_used(given, RunConfig.content(config)[0].get("method")),
    )
    return {"dry_run": True, "seeds": numbers, **found}


def show_runs(
    out: Output,
    configs: Mapping[str, RunConfig],
    times: int,
    planned: str,
    *,
    require: Callable[[Mapping[str, int]], None] = lambda rows: None,
    seconds: float = 0.0,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Show what would be trained, and what it would cost, without loading a model's weights.

    Args:
        out: Where to.
        configs: Settings by name.
        times: Number of runs of each.
        planned: The runs in words.
        require: Raises if the rows of the splits do not suffice.
        seconds: Of other runs.
        notes: Shown last.

    Returns:
        The part of the command's JSON that says so.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Training would raise it before its first step.
    """
    from graftwerk.cli.doctor import describe_cost, with_augmented
    from graftwerk.experiments.preflight import preflight
    from graftwerk.training.data_checks import raise_on_severe

    shown = table("method", "trained", "share", "learning rate", numbers=("trained", "share", "learning rate"))
    methods: list[dict[str, Any]] = []
    checked: dict[str, Any] = {}
    for name, config in configs.items():
        checked = preflight(config)
        parameters = checked["parameters"]
        methods.append(
            {
                "name": name,
                "method": checked["method"],
                "parameters": parameters,
                "steps": checked["steps"],
                "augmented_at_most": checked["data"]["augmented_at_most"],
                "plan": checked["plan"],
            }
        )
        shown.add_row(
            printable(name), count(parameters["trained"]), share(parameters["share"]), f"{checked['learning_rate']:g}"
        )
    require(checked["data"]["rows"])
    out.show(shown)
    steps = sum(one["steps"] for one in methods) * times
    note = with_augmented(max((one["augmented_at_most"] for one in methods if one["augmented_at_most"]), default=None))
    rows = ", ".join(f"{number:,} {name}" for name, number in checked["data"]["rows"].items())
    each = checked["rows_per_step"]
    out.line(f"\n{planned}, {steps:,} steps of {each} rows; rows: {rows}{note}")
    plans = [one["plan"] for one in methods]
    if unknown := next((plan for plan in plans if "why_not" in plan), None):
        out.line(describe_cost(unknown))
    else:
        seconds += times * sum(plan["time"]["training_seconds"] for plan in plans)
        out.line(describe_cost(max(plans, key=lambda plan: plan["memory"]["train_peak_bytes"]), seconds))
    for text in notes:
        out.warn(f"note: {printable(text)}")
    for finding in checked["findings"]:
        out.warn(f"{'SEVERE' if finding['grave'] else 'note'}: {printable(finding['message'])}")
    raise_on_severe(checked["findings"], checked["allowed"])
    data = {key: checked[key] for key in ("data", "findings", "output_dir")}
    return {"methods": methods, "steps": steps, **data}
