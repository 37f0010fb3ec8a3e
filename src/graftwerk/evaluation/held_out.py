"""Rows to measure an adapter on: those that its run held out, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.evaluation.loading import LoadedAdapter
from graftwerk.tasks import dataset_cache
from graftwerk.tasks.base import Row, Splits, Task


def check_columns(data: object, columns: object) -> None:
    """Check that columns are named for given rows alone.

    Raises:
        ConfigError: There are columns and no data.
    """
    if data is None and columns is not None:
        raise ConfigError(
            "`columns` says how the columns of `data` are called, and no data is given",
            hint="add --data rows.csv (data=), or leave --column (columns=) out",
        )


def held_out(opened: LoadedAdapter) -> tuple[str, Sequence[Row]]:
    """Return the run's held-out rows: test if there are any, else validation.

    Raises:
        ConfigError: an adapter folder alone, or a run that held nothing out.
        IntegrityError: the data has changed since, so these may be rows that were trained on.
    """
    if opened.settings is None:
        raise ConfigError(
            f"{opened.info.folder} is an adapter folder alone and has no rows of its own",
            hint="give labelled rows with --data (data=...), or the run folder that the adapter came from",
        )
    return first_held_out(own_splits(opened.task, opened.settings, opened.labels, opened.data_fingerprint))


def own_splits(task: Task, settings: RunConfig, labels: Sequence[str], fingerprint: str | None) -> Splits:
    """Read a run's rows again.

    Args:
        task: The run's task.
        settings: Its settings.
        labels: Its label names.
        fingerprint: Of the rows that it was trained on, or None if that is unknown.

    Raises:
        IntegrityError: as for `held_out`.
    """
    splits = dataset_cache.read(task, settings.data, labels)
    if fingerprint is not None and splits.fingerprint != fingerprint:
        raise IntegrityError(
            "the data has changed since the training, so the held-out rows may be rows that were trained on",
            where=f"{settings.data.train}: fingerprint {splits.fingerprint[:12]}, at training {fingerprint[:12]}",
            hint="give labelled rows that were not trained on with --data (data=...)",
        )
    return splits


def first_held_out(splits: Splits) -> tuple[str, Sequence[Row]]:
    """Return the held-out rows as `held_out` does.

    Raises:
        ConfigError: nothing is held out.
    """
    for name in ("test", "validation"):
        rows: Sequence[Row] = getattr(splits, name)
        if rows:
            return name, rows
    raise ConfigError(
        "this run held no rows out",
        where="data.validation, data.test",
        hint="give labelled rows with --data (data=...)",
    )


def labelled_rows(opened: LoadedAdapter, data: str, columns: dict[str, str] | None) -> Sequence[Row]:
    """Read all rows of a source, with labels that the adapter knows."""
    settings = DataSettings(train=data, columns=opened.columns if columns is None else columns, validation=None)
    return opened.task.read(settings, opened.labels).train
