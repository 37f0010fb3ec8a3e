"""`train`: from a run file to a run folder. Mistakes are found in the order of the cost of finding them.

First the settings, then the folder, the data, the model; only then is anything of an earlier run replaced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.own_files import refuse_links
from graftwerk.training.callbacks.trackers import check_trackers
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event, EventBus, Listener, to_logging
from graftwerk.training.progress_display import Progress
from graftwerk.training.run_dir import (
    LOCK,
    MADE_BEFORE,
    RUN_FILES,
    Run,
    RunDir,
)
from graftwerk.training.run_driver import RunDriver

__all__ = ["Run", "train"]


def train(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train an adapter as a run file says, show its progress, and leave a run folder.

    Args:
        config: A run file, its content as a mapping, or a `RunConfig`.
        resume: Resume the run in `output_dir`, bit for bit as if it had never stopped; start it if there is none. A
            finished run is returned as it is.
        overwrite: Replace the run in `output_dir`.
        listener: Called with every event as it happens (`training.events`), in place of the progress display.
        quiet: Show no progress; problems go to `logging`.
        overrides: Settings by name, over those of the run file: ``learning_rate=1e-3``, ``method="prefix"``; dotted
            keys as ``**{"data.max_train_rows": 100}``.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Found before anything is trained or replaced.
        UnsupportedError: Several processes were asked for, and this one cannot be forked.
        ConflictError: Another process trains there, there is a run already, or the resumed run is another one.
        RunInterrupted: SIGINT or SIGTERM came; the state was saved.
        DivergedError: Loss or gradients were not finite again and again.
        IntegrityError: No checkpoint is intact, or a file of the run is a link.
        ForgettingError: The run is finished and has lost more than `evaluation.max_forgetting` allows.

    Examples:
        >>> settings = {"model": "my-encoder", "method": "lora", "data": {"train": "movies.csv", "test": 0.2}}
        >>> config = RunConfig.build(settings, {"learning_rate": 1e-3})
        >>> config.training.learning_rate
        0.001
        >>> run = train(config)  # doctest: +SKIP
        >>> run.manifest["metrics"]["test"]["accuracy"]["value"]  # doctest: +SKIP
        0.87
    """
    from graftwerk.training.retained import refuse_forgotten

    started_at = time.monotonic()
    settings = RunConfig.of(config, overrides)
    display = None if quiet or listener is not None else Progress()
    with display or nullcontext():
        run = run_training(
            settings, resume=resume, overwrite=overwrite, listener=listener or display, started_at=started_at
        )
    refuse_forgotten(run.manifest, run.adapter)
    return run


def run_training(
    settings: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    started_at: float,
    shared_cache: Path | None = None,
    trial: bool = False,
) -> Run:
    """Train as `train` does, for callers that own the process.

    Args:
        settings: All settings of the run.
        resume: As for `train`.
        overwrite: As for `train`.
        listener: Called with every event as it happens. Default: problems go to `logging`.
        started_at: Value of `time.monotonic()` from which the seconds to the first step are counted.
        shared_cache: Folder in which this run and others share the hidden states of frozen layers, unless the settings
            name one.
        trial: Measure the validation rows alone. A call without it and with ``resume`` measures the test rows too.

    Returns:
        The finished run.

    Raises:
        GraftwerkError: As `train` does.
    """
    settings = settings.anchored()
    settings.dump()  # settings that could not be written, or not be read again, are refused before anything is done
    check_trackers(settings.training.report_to)
    folder = RunDir(settings.output_dir)
    refuse_links(folder.path, (LOCK, *MADE_BEFORE, *RUN_FILES))
    from graftwerk.training.forked_workers import run_forked
    from graftwerk.training.num_processes import resolve_num_processes

    checkpoints = Checkpoints(folder.checkpoints, limit=settings.training.save_total_limit)
    num_processes = resolve_num_processes(settings, checkpoints, resume)

    def job() -> None:
        from graftwerk.training.distributed import is_main_process

        bus = EventBus(*([listener or to_logging] if is_main_process() else []))
        checkpoints.warn = lambda text: bus(Event("warning", 0, text=text))
        run = RunDriver(settings, folder, checkpoints, bus, started_at, shared_cache, trial)
        run.train_in_lock(resume=resume, overwrite=overwrite, forked=num_processes > 1)

    run_forked(job, num_processes, checkpoints.recoverable)
    return Run(folder.path)
