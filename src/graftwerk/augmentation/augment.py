"""`augment`: from rows, or the training rows of a run file, to a file of augmented rows."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.augmentation.pipeline import Augmented, Progress, make
from graftwerk.augmentation.progress_log import journal_of
from graftwerk.augmentation.rows import changed_part, read_and_written
from graftwerk.augmentation.settings import Augmenter, FromFile, Generation, Noise, parse_augmenters
from graftwerk.config import RunConfig
from graftwerk.data.files import read_file
from graftwerk.data.rows import resolve_bad_rows
from graftwerk.errors import ConfigError, DataError, RunInterrupted
from graftwerk.evaluation.row_errors import naming_source
from graftwerk.own_files import refuse_link
from graftwerk.resource_paths import locate

AUGMENTED = "augmented.jsonl"
"""The file's name in a run folder; a run finds there what was made for it before."""


def augment(
    config: RunConfig | str | Path | Mapping[str, Any] | None = None,
    *,
    data: str | Path | Sequence[Mapping[str, Any]] | None = None,
    by: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: Progress | None = None,
    **overrides: Any,
) -> Augmented | dict[str, Any]:
    """Write augmented rows to a file, from the training rows of a run file or from any rows.

    Args:
        config: A run file with `data.augment`. Only its training rows are augmented, never the held-out ones.
        data: In place of a run file: a file of rows (csv, tsv, jsonl, json, parquet, ``pkg://...``), or the rows
            themselves. All their columns are copied to the augmented rows.
        by: With `data`: one augmenter or several, each a name or a mapping with `name`.
        out: The file to write. Default with a run file: ``augmented.jsonl`` in its `output_dir`, where training
            looks for it.
        resume: Continue an interrupted file; a finished one is returned as it is.
        overwrite: Replace an existing file.
        dry_run: Check everything and return the plan; no model is loaded and nothing is written.
        on_progress: Called with (rows done, rows in all) while a model generates.
        overrides: Settings of the run file by name, as for `train`.

    Returns:
        The augmented rows (`Augmented`); with `dry_run` a mapping with ``dry_run``, ``file``, ``rows`` and
        ``augmenters``: name, settings, the fields read and written, and the largest number of variants of each.

    Raises:
        ConfigError: Neither a run file nor data, or both; no augmenter; no output file.
        ConflictError: As for `pipeline.make`.
        RunInterrupted: SIGINT or SIGTERM came; finished rows are saved, and `resume` continues after them.
        DataError, ModelError, ResourceError, IntegrityError: As for reading data and loading models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from graftwerk import augment
        >>> rows = [{"text": "a quiet little film", "label": "good"}, {"text": "far too long", "label": "bad"}]
        >>> augmenter = {"name": "word_dropout", "probability": 0.5}
        >>> made = augment(data=rows, by=augmenter, out=Path(mkdtemp(), "rows.jsonl"))
        >>> made.path.name, made.rows
        ('rows.jsonl', 2)
    """
    if (config is None) == (data is None):
        raise ConfigError("give a run file or data" + ("" if config is None else ", not both"))
    if config is not None:
        if by is not None:
            raise ConfigError("a run file says itself what to augment by: data.augment", where="by")
        rows, augmenters, parts, usual = _of_run(_settings(config, overrides))
    else:
        if overrides:
            raise ConfigError(f"`{next(iter(overrides))}` is a setting of a run file, and none is given")
        rows, augmenters, parts, usual = _of_data(data), parse_augmenters(by), (), None
        if not augmenters:
            raise ConfigError("no augmenter is named", where="by", hint="for instance by='word_dropout'")
    _refuse_files(augmenters)
    target = Path(out) if out is not None else usual
    if target is None:
        raise ConfigError("no output file is named", where="out", hint="name it: out='rows.augmented.jsonl'")
    if out is None:
        refuse_link(target)
    if target.suffix.lower() != ".jsonl":
        raise ConfigError(f"augmented rows are written as .jsonl, and {target} ends otherwise", where="out")
    if isinstance(data, str | Path) and target.resolve() == locate(data).resolve():
        raise ConfigError(f"{target} is the file of the real rows, which stays as it is", where="out")
    if not rows:
        raise DataError("there are no rows to augment")
    if dry_run:
        return {"dry_run": True, "file": str(target), "rows": len(rows), "augmenters": plan(rows, augmenters, parts)}
    try:
        return make(rows, augmenters, target, parts=parts, resume=resume, overwrite=overwrite, on_progress=on_progress)
    except (KeyboardInterrupt, RunInterrupted) as stopped:
        journal = journal_of(target)
        raise RunInterrupted(
            stopped.signum if isinstance(stopped, RunInterrupted) else signal.SIGINT,
            stopped.what if isinstance(stopped, RunInterrupted) else "stopped by Ctrl-C",
            recovered=str(journal) if journal.exists() else None,
            hint="run the same command with --resume to continue from there" if journal.exists() else None,
        ) from None


def plan(
    rows: Sequence[Mapping[str, Any]], augmenters: Sequence[Augmenter], parts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what each augmenter would do, without making any rows.

    Returns:
        For each augmenter ``name``, ``settings``, ``variants`` (the most there can be), and ``reads`` and ``writes``.

    Raises:
        ConfigError: An augmenter does not fit the rows.
    """
    planned = []
    for augmenter in augmenters:
        what: dict[str, Any] = {"name": augmenter.name, "settings": augmenter.to_dict()}
        if isinstance(augmenter, Noise):
            what["reads"] = what["writes"] = changed_part(augmenter.part, rows, parts)
        elif isinstance(augmenter, Generation):
            what["reads"], what["writes"] = read_and_written(augmenter, rows, parts)
        planned.append({**what, "variants": len(rows) * getattr(augmenter, "n", 0)})
    return planned


def _settings(config: RunConfig | str | Path | Mapping[str, Any], overrides: dict[str, Any]) -> RunConfig:
    if isinstance(config, RunConfig):
        return RunConfig.build(config.model_dump(mode="json"), overrides) if overrides else config
    if isinstance(config, Mapping):
        return RunConfig.build(RunConfig.build(dict(config)).model_dump(mode="json"), overrides)
    return RunConfig.load(config, overrides)


Work = tuple[Sequence[Mapping[str, Any]], tuple[Augmenter, ...], Sequence[str], Path | None]


def _of_run(settings: RunConfig) -> Work:
    augmenters = tuple(one for one in settings.data.augment if not isinstance(one, FromFile))
    if not augmenters:
        raise ConfigError(
            "the run file asks for no augmented rows that could be made",
            where="data.augment",
            hint="for instance data.augment: [word_dropout]",
        )
    splits = settings.task.read(settings.data)
    return splits.train, augmenters, settings.task.fields, settings.output_dir / AUGMENTED


def _of_data(data: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(data, str | Path):
        return [dict(row) for row in data]
    with naming_source(str(data)):
        table = read_file(locate(data), str(data))
        resolve_bad_rows(table, "fail")
    return table.rows


def _refuse_files(augmenters: Sequence[Augmenter]) -> None:
    if any(isinstance(one, FromFile) for one in augmenters):
        raise ConfigError(
            "`file` names rows that are there already; it makes none", where="by", hint="it belongs into a run file"
        )
