"""`compare`: methods on the user's data, over several seeds, with the significance of their differences.

Every method and seed is an ordinary run folder below `output_dir` (`lora-seed0`, ...), trained and evaluated in a
process of its own that is forked from one with all imports done (`fork_server.py`). All runs share base, rows and
splits; only the method and the seed differ, and each method trains at its own learning rate. Runs go seed by seed, so
that a comparison interrupted half way already has all methods. The same call again resumes it, even in the middle of a
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.experiments.arguments import check_choices
from graftwerk.experiments.budget import parse_budget
from graftwerk.experiments.driver import ComparisonDriver, Listener
from graftwerk.experiments.method_specs import parse_method_specs, parse_seeds
from graftwerk.experiments.progress import progress_to
from graftwerk.experiments.result_folder import ResultFolder
from graftwerk.experiments.table import as_text, rich_table
from graftwerk.experiments.workers import machines
from graftwerk.reporting.files import COMPARISON as COMPARISON
from graftwerk.serialization.untrusted_files import understood


class Comparison(ResultFolder):
    """A comparison on disk: `comparison.json`, beside a run folder for each method and seed."""

    file, key, counted = COMPARISON, "comparison", ("methods", "seeds")

    def _as_text(self) -> str:
        return as_text(self.result)

    def __rich__(self) -> Any:
        with understood(self.folder / COMPARISON):
            return rich_table(self.result)


def compare(
    config: RunConfig | str | Path | Mapping[str, Any],
    methods: Sequence[Any] | str,
    seeds: Sequence[int] | int | str = (0, 1, 2),
    *,
    augment: Sequence[str] | str | None = None,
    budget: int | str | None = None,
    vary: str = "training",
    overwrite: bool = False,
    metric: str | None = None,
    prefer: str = "trained_parameters",
    margin: float | None = None,
    listener: Listener | None = None,
    quiet: bool = False,
    report: bool = True,
    ray: str | None = None,
    resources: str | Mapping[str, float] | None = None,
    **overrides: Any,
) -> Comparison:
    """Train and evaluate each method with each seed, and test the differences for significance.

    A second call with the same settings resumes an interrupted comparison. A run that diverges, or whose process dies,
    is reported and the others continue; any other error stops the comparison, and finished runs stay on disk.

    Args:
        config: A run file, its content, or a `RunConfig`. Its `method` and seed are not used; `output_dir` is the
            folder of the comparison.
        methods: Names (`lora`), shorthands (`dora`), mappings (``{name: lora, r: 16}``; a `label` names it), or
            method objects.
        seeds: Training seeds. The split of the rows has its own seed and is the same for all runs.
        augment: `with`, `without` or `with,without`: each method with the rows of `data.augment`, without them, or
            both. None means the methods as they are.
        budget: What each method may spend on finding its settings, the same for all: a number of trials (`4`), or time
            for training (`"10min"`). Trials are measured on validation rows, and what was chosen is trained with the
            seeds. None means that each method trains at its own defaults, or at all values of ``overrides``.
        vary: What a seed varies: `training` (initialisation, order, dropout), or `split`: which rows are training and
            validation rows as well, with the same test rows.
        overwrite: Train all runs again.
        metric: The metric that decides. Default: the task's own.
        prefer: The cost that the recommendation minimises, one of `pareto.COSTS`.
        margin: Distance in the metric's own unit (0.01 is a point of accuracy) within which two methods are practically
            equal, and from the best mean at which one may be recommended. Default: a point, or one percent of the best
            if the metric has no points.
        listener: Called with every `ProgressEvent`, in place of the progress display on stderr.
        quiet: Show no progress.
        report: Write `report.html`.
        ray: Address of a Ray cluster (``head:6379``), ``auto`` for the one of this machine, or ``local`` for one that
            is started here; its machines train as many runs at once as they have room for. None: one at a time here.
        resources: What a run takes of the cluster: ``"CPU=2,GPU=1"``. Default: a processor, and a GPU if there are any.
        **overrides: Settings of the run file by name, as for `train`. Several values of a setting of the training
            (``learning_rate=[1e-3, 3e-3]``) are tried for each method; what stands for it is chosen on validation rows.

    Returns:
        The comparison, whose `table` is the result as text.

    Raises:
        ConfigError, DataError, ModelError: Found before training begins.
        ConflictError: The folder is in use, or holds other runs.
        RunInterrupted: SIGINT or SIGTERM came; the active run has saved a checkpoint.
        ResourceError: Disk or memory do not suffice; Ray is not installed, or cannot be reached.

    Example:
        Settings are checked before any process is started:

        >>> from graftwerk import compare
        >>> config = {"model": "some/model", "data": {"train": "reviews.csv"}, "output_dir": "runs/comparison"}
        >>> compare(config, methods=["lora", {"name": "lora", "r": 16}, "lroa"], seeds=[0, 1, 2])
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: there is no method `lroa`
        ...
    """
    given, numbers, allowed = parse_method_specs(methods), parse_seeds(seeds), parse_budget(budget)
    with progress_to(listener, quiet) as shown:
        driver = ComparisonDriver(config, given, numbers, overrides, augment, listener=shown, budget=allowed, vary=vary)
        return run_comparison(
            driver, report=report, ray=ray, resources=resources, overwrite=overwrite, metric=metric, prefer=prefer,
            margin=margin,
        )  # fmt: skip


def run_comparison(
    driver: ComparisonDriver,
    *,
    report: bool,
    ray: str | None,
    resources: str | Mapping[str, float] | None,
    overwrite: bool,
    metric: str | None,
    prefer: str,
    margin: float | None,
) -> Comparison:
    """Make the runs of a comparison, and write its report; arguments are as for `compare`.

    Raises:
        GraftwerkError: As `compare` does.
    """
    check_choices(driver.base, metric, prefer, margin)
    with machines(ray, resources) as there:
        driver.run(there, overwrite=overwrite, metric=metric, prefer=prefer, margin=margin)
    return Comparison.reported(driver.folder, report)
