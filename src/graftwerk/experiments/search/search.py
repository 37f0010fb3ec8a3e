"""`search`: better settings for a method, found on validation rows and judged on rows the search never saw.

Every trial is an ordinary run folder below `output_dir` (`trials/007`), trained in a process of its own like the runs
of a comparison. Trials see training and validation rows alone. At the end the best few are trained again with fresh
seeds, the best of them by its validation rows is measured on the test rows, once, and so are the settings of the run
file with the same seeds: the difference of these two is the result. The best of many trials on the rows that chose it
would flatter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig, parse_overrides
from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.experiments.progress import progress_to
from graftwerk.experiments.search.driver import FORMAT, SEARCH_SCALE, SearchDriver
from graftwerk.experiments.search.journal import require_optuna
from graftwerk.experiments.search.runs import Listener
from graftwerk.experiments.search.settings import SearchSettings
from graftwerk.experiments.search.space import Axis, read_space
from graftwerk.experiments.search.table import as_text
from graftwerk.experiments.workers import machines
from graftwerk.own_files import refuse_links
from graftwerk.reporting.files import SEARCH
from graftwerk.serialization.untrusted_files import read_sealed, understood
from graftwerk.settings_parsing import parse_settings


class Search:
    """A search on disk.

    Attributes:
        folder: Its folder, with a run folder for each trial.
        result: Contents of `search.json`.
        report: Path of `report.html`, or None if no report was requested.

    Raises:
        ConfigError: There is no search in that folder.
        IntegrityError: `search.json` is damaged, or has another format version.
    """

    def __init__(self, folder: str | Path, *, report: Path | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / SEARCH).is_file():
            raise ConfigError(f"{folder} holds no search: it has no {SEARCH}")
        refuse_links(self.folder, (SEARCH,))
        self.result = read_sealed(self.folder / SEARCH, scale=SEARCH_SCALE)
        if self.result.get("format") != FORMAT:
            raise IntegrityError(f"{SEARCH} has another format than {FORMAT}", where=str(self.folder))
        self.report = report

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `graftwerk search --json` prints."""
        return {"folder": str(self.folder), "report": str(self.report) if self.report else None, **self.result}

    def __str__(self) -> str:
        with understood(self.folder / SEARCH):
            return as_text(self.result)

    def __repr__(self) -> str:
        return f"<Search {self.folder}: {len(self.result['trials'])} trials>"


def search(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    trials: int | None = None,
    seconds: float | None = None,
    sampler: str = "tpe",
    pruner: str = "median",
    workers: int | None = None,
    finalists: int = 3,
    repeats: int = 3,
    metric: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
    quiet: bool = False,
    report: bool = True,
    ray: str | None = None,
    resources: str | Mapping[str, float] | None = None,
    **settings: Any,
) -> Search:
    """Search for better settings of a method, and say on fresh rows whether they beat those of the run file.

    A second call with the same settings resumes a search that was stopped or killed, even in the middle of a trial; a
    larger budget adds trials.

    Args:
        config: A run file, its content, or a `RunConfig`; `output_dir` is the folder of the search. It holds out
            validation and test rows.
        trials: Trials in all. Default: 20, or as many as `seconds` allow, or the whole grid.
        seconds: Seconds of trials; none begins after them.
        sampler: `tpe`, `random` or `grid`.
        pruner: `median`, `wilcoxon` or `none`: when a trial is given up.
        workers: Trials at once. Default: 1, or with ``ray`` as many as the cluster has room for.
        finalists: Best trials that are trained again with fresh seeds.
        repeats: Fresh seeds for each of them, and for the settings of the run file.
        metric: The metric that decides. Default: the task's own.
        overwrite: Begin anew, and remove the trials that are there.
        listener: Called with every `ProgressEvent`, in place of the progress display on stderr.
        quiet: Show no progress.
        report: Write `report.html`.
        ray: As for `compare`.
        resources: As for `compare`.
        **settings: Axes (``learning_rate="1e-4..1e-2"``, ``r="4,8,16"``) and settings of the run file by name
            (``**{"training.num_train_epochs": 3}``), which are then not searched.

    Returns:
        The search, whose text is the result.

    Raises:
        ConfigError, DataError, ModelError: Found before training begins.
        ConflictError: The folder is in use, or holds something else.
        ResourceError: Optuna is not installed; disk or memory do not suffice.
        RunInterrupted: SIGINT or SIGTERM came; the active trial has saved a checkpoint.

    Example:
        Settings are checked before any process is started:

        >>> from graftwerk import search
        >>> config = {"model": "some/model", "method": "lora", "output_dir": "runs/search"}
        >>> config["data"] = {"train": "reviews.csv", "test": 0.2}
        >>> search(config, learning_rat="1e-4..1e-2")
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: lora has no setting `learning_rat` that could be searched
        ...
    """
    own = {"trials": trials, "seconds": seconds, "sampler": sampler, "pruner": pruner,
           "workers": 1 if workers is None else workers,
           "finalists": finalists, "repeats": repeats, "metric": metric}  # fmt: skip
    base, axes, wanted, notes = read_search(config, {**own, **settings})
    require_optuna()
    at_once = None if workers is None else wanted.workers
    with progress_to(listener, quiet) as shown, machines(ray, resources, at_once) as there:
        wanted = wanted.model_copy(update={"workers": there.at_once})
        driver = SearchDriver(base, axes, wanted, notes, listener=shown)
        driver.run(there, overwrite=overwrite)
    report_path = None
    if report:
        from graftwerk.reporting.html import write_report

        report_path = write_report(driver.folder)
    return Search(driver.folder, report=report_path)


def read_search(
    config: RunConfig | str | Path | Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[RunConfig, list[Axis], SearchSettings, list[str]]:
    """Return what a search is of: the run, its axes, the settings of the search, and notes on axes left out.

    Args:
        config: As for `search`.
        given: Settings of the search, axes, and settings of the run file.

    Raises:
        ConfigError: Something of it is wrong.
    """
    given = parse_overrides(dict(given))
    own = {key: value for key, value in given.items() if key in SearchSettings.model_fields}
    wanted = parse_settings(SearchSettings, own, what="a search", where="search")
    rest = {key: value for key, value in given.items() if key not in own}
    whole = {key: rest.pop(key) for key in [*rest] if key in RunConfig.model_fields}
    base = RunConfig.of(config, whole)
    axes, fixed, notes = read_space(base, rest)
    base = RunConfig.of(base, fixed).anchored()
    if wanted.metric is not None and wanted.metric not in base.task.metrics:
        hint = f"there are: {', '.join(base.task.metrics)}"
        raise ConfigError(f"there is no metric `{wanted.metric}` for {base.task.name}", where="metric", hint=hint)
    return base, axes, wanted, notes
