"""`ablate`: one method with several values of its settings, over several seeds, and the effect of each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.experiments.compare import Comparison, run_comparison
from graftwerk.experiments.driver import ComparisonDriver, Listener
from graftwerk.experiments.factors import Ablation, read_ablation
from graftwerk.experiments.method_specs import parse_seeds
from graftwerk.experiments.progress import progress_to


def ablate(
    config: RunConfig | str | Path | Mapping[str, Any],
    axes: Mapping[str, Sequence[Any] | str],
    seeds: Sequence[int] | int | str = (0, 1, 2),
    *,
    design: str = "grid",
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
    """Train and evaluate the run file's method with several values of its settings, and test the effect of each.

    Every combination is trained with each seed on the same rows, as `compare` does it: the folders, intervals, table
    and report are those of a comparison. A second call with the same settings resumes an interrupted ablation.

    Args:
        config: A run file, its content, or a `RunConfig`. Its `output_dir` is the folder of the ablation.
        axes: Values by setting of the method or of the training: ``{"method.r": [4, 8], "lr": "1e-3,3e-3"}``.
        seeds: Training seeds.
        design: ``grid`` trains all combinations; ``one-at-a-time`` changes one setting of the run file at a time.
        vary: As for `compare`.
        overwrite: Train all runs again.
        metric: The metric that decides. Default: the task's own.
        prefer: The cost that the recommendation minimises, one of `pareto.COSTS`.
        margin: As for `compare`.
        listener: Called with every `ProgressEvent`, in place of the progress display on stderr.
        quiet: Show no progress.
        report: Write `report.html`.
        ray: As for `compare`.
        resources: As for `compare`.
        **overrides: Settings of the run file by name, as for `train`.

    Returns:
        The comparison of the cells; ``result["ablation"]`` has the effect of each axis.

    Raises:
        ConfigError, DataError, ModelError: Found before training begins.
        ConflictError: The folder is in use, or holds other runs.
        RunInterrupted: SIGINT or SIGTERM came; the active run has saved a checkpoint.
        ResourceError: Disk or memory do not suffice.

    Example:
        >>> from graftwerk import ablate
        >>> config = {"model": "some/model", "method": "lora", "data": {"train": "reviews.csv"}}
        >>> ablate(config, {"method.rnk": [4, 8]})
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: `method.rnk` is no setting of lora or of the training
        ...
    """
    base, ablation = read_cells(config, axes, design, overrides)
    with progress_to(listener, quiet) as shown:
        driver = ComparisonDriver(
            base, ablation.specs, parse_seeds(seeds), {}, None, listener=shown, ablation=ablation, vary=vary
        )
        return run_comparison(
            driver, report=report, ray=ray, resources=resources, overwrite=overwrite, metric=metric, prefer=prefer,
            margin=margin,
        )  # fmt: skip


def read_cells(
    config: RunConfig | str | Path | Mapping[str, Any],
    axes: Mapping[str, Any],
    design: str,
    overrides: Mapping[str, Any],
) -> tuple[RunConfig, Ablation]:
    """Return the settings that all cells share, and the cells.

    Raises:
        ConfigError: As `read_ablation` and `RunConfig.build` do.
    """
    for key in overrides:
        if key.split(".")[-1] == "seed":
            raise ConfigError(f"`{key}`: an ablation has several seeds", where=key, hint="seeds=0,1,2")
    base = RunConfig.of(config, overrides).anchored()
    return base, read_ablation(base, axes, design)
