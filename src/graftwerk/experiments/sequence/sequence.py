"""`sequence`: tasks learnt one after the other, and the matrix of what is known of each after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.experiments.job_runner import JobRunner
from graftwerk.experiments.method_specs import parse_seeds
from graftwerk.experiments.progress import progress_to
from graftwerk.experiments.result_folder import ResultFolder
from graftwerk.experiments.sequence.driver import Listener, SequenceDriver
from graftwerk.experiments.sequence.plan import read_plan
from graftwerk.experiments.sequence.table import plain
from graftwerk.reporting.files import SEQUENCE


class LearntSequence(ResultFolder):
    """A sequence on disk: `sequence.json`, beside a run folder for each variant, seed and task."""

    file, key, counted = SEQUENCE, "sequence", ("tasks", "variants")

    def _as_text(self) -> str:
        return plain(self.result)


def sequence(
    config: str | Path | Mapping[str, Any],
    seeds: Sequence[int] | int | str = (0, 1, 2),
    *,
    variants: Sequence[str] | str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
    quiet: bool = False,
    report: bool = True,
    **overrides: Any,
) -> LearntSequence:
    """Learn tasks one after the other, and measure after each what is still known of those before it.

    A second call with the same settings resumes an interrupted sequence. A run that diverges ends the sequence of its
    variant and seed, and the others continue.

    Args:
        config: A file with `tasks` (and perhaps `variants`) beside the keys of a run file, or its content.
        seeds: Training seeds. The rows of a task are the same for all.
        variants: Names of the variants to learn with, or None for all.
        overwrite: Train all runs again.
        listener: Called with every `ProgressEvent`, in place of the progress display on stderr.
        quiet: Show no progress.
        report: Write `report.html`.
        **overrides: Settings of the run file by name, for all tasks and variants.

    Returns:
        The sequence, whose `table` is the result as text.

    Raises:
        ConfigError, DataError, ModelError: Found before training begins.
        ConflictError: The folder is in use, or holds something else.
        RunInterrupted: SIGINT or SIGTERM came; the active run has saved a checkpoint.
        ResourceError: Disk or memory do not suffice.

    Example:
        Settings are checked before any process is started:

        >>> from graftwerk import sequence
        >>> common = {"model": "some/model", "method": "lora"}
        >>> sequence({**common, "tasks": {"films": {"data": {"train": "films.csv"}}}})
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: a sequence has two tasks or more, by name
        ...
    """
    names = [part.strip() for part in variants.split(",")] if isinstance(variants, str) else variants
    plan = read_plan(config, overrides, None if names is None else list(names))
    with progress_to(listener, quiet) as shown:
        driver = SequenceDriver(plan, parse_seeds(seeds), shown)
        driver.run(JobRunner, overwrite=overwrite)
    return LearntSequence.reported(driver.folder, report)
