"""Augmented training rows: made before training, into the run folder, or read from a file; never for evaluation.

The real rows stay as they are, in their own file and with their own fingerprint; augmented rows have another, and
both are part of the identity of a run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwerk.augmentation.augment import AUGMENTED, plan
from graftwerk.augmentation.pipeline import Augmented, make, weighted
from graftwerk.augmentation.rows import ORIGIN
from graftwerk.augmentation.settings import FromFile
from graftwerk.config import RunConfig
from graftwerk.data.checks import check_truncation
from graftwerk.data.files import read_file
from graftwerk.data.keyed_rng import fingerprint
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConflictError, DataError
from graftwerk.resource_paths import locate
from graftwerk.tasks.base import Row, Splits
from graftwerk.training.distributed import Distributed
from graftwerk.training.events import Event, Listener
from graftwerk.training.setup import Prepared

HELD_OUT = ("validation", "test")


def add_augmented(
    prepared: Prepared, settings: RunConfig, folder: Path, emit: Listener, processes: Distributed
) -> Prepared:
    """Add the rows of `data.augment` after the real training rows, made or read.

    Args:
        prepared: The rows so far.
        settings: Settings of the run.
        folder: The run folder. ``augmented.jsonl`` in it is used if it matches the settings (``graftwerk augment`` or
            an interrupted run may have made it), completed if it is unfinished, and replaced otherwise.
        emit: Listener of events.
        processes: Processes that train together.

    Returns:
        The same with augmented rows.

    Raises:
        DataError: Augmented rows were made from held-out rows, or a file has no rows of this task.
    """
    wanted = settings.data.augment
    if not wanted:
        return prepared
    emit(Event("phase", 0, name="augmenting the training rows"))
    making = [augmenter for augmenter in wanted if not isinstance(augmenter, FromFile)]
    made: list[Sequence[dict[str, Any]]] = []
    counts: list[dict[str, Any]] = []
    files: list[str] = []
    digests: list[str] = []
    if making:
        result = _made(prepared, settings, folder / AUGMENTED, emit, processes)
        made += result.parts
        counts += result.counts
        files.append(AUGMENTED)
        digests.append(result.fingerprint)
    used: list[Row] = []
    for augmenter in wanted:
        if isinstance(augmenter, FromFile):
            rows = _read(augmenter.path, settings, prepared)
            counts.append({"kind": augmenter.name, "read": len(rows), "made": len(rows), "left_out": {}})
            files.append(augmenter.path)
            digests.append(hashlib.sha256(locate(augmenter.path).read_bytes()).hexdigest())
        else:
            rows = list(made.pop(0))
            _refuse_leaks(rows, prepared.splits, str(folder / AUGMENTED))
        used += [
            {key: value for key, value in row.items() if key != ORIGIN} for row in weighted(rows, augmenter.weight)
        ]
    examples = prepared.task.encode(used, prepared.tokenizer, prepared.splits, prepared.max_length)
    findings = [
        {"code": "augmented-left-out", "rows": count, "grave": False, "example": None, "hint": None,
         "message": f"{made_by['kind']}: {count:,} variants left out ({reason.replace('_', ' ')})"}
        for made_by in counts
        for reason, count in made_by["left_out"].items()
    ]  # fmt: skip
    lost = [example.truncated for example in examples]
    findings += [
        vars(it) for it in check_truncation(lost, prepared.max_length, settings.data.max_truncated, "augmented")
    ]
    for finding in findings:
        emit(Event("finding", 0, **finding))
    return replace(
        prepared,
        examples={**prepared.examples, "train": [*prepared.examples["train"], *examples]},
        findings=[*prepared.findings, *findings],
        augmented={
            "rows": len(examples),
            "fingerprint": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
            "files": files,
            "made": counts,
        },
    )


def planned(prepared: Prepared, settings: RunConfig) -> int | None:
    """Return how many examples `add_augmented` would add at most, without making any.

    Returns:
        The number, or None without augmentation.

    Raises:
        ConfigError, DataError: Errors that making or reading the rows would raise.
    """
    if not settings.data.augment:
        return None
    rows = prepared.splits.train
    asked = plan(rows, settings.data.augment, prepared.task.fields)
    variants = 0.0
    for augmenter, what in zip(settings.data.augment, asked, strict=True):
        read = len(_read(augmenter.path, settings, prepared)) if isinstance(augmenter, FromFile) else what["variants"]
        variants += augmenter.weight * read
    # rows that are cut into several are so in their variants too
    return math.ceil(variants * len(prepared.examples["train"]) / len(rows))


def _made(prepared: Prepared, settings: RunConfig, target: Path, emit: Listener, processes: Distributed) -> Augmented:
    """Make the rows on the main process; the others wait, and then read them."""
    making = [augmenter for augmenter in settings.data.augment if not isinstance(augmenter, FromFile)]
    rows, parts = prepared.splits.train, prepared.task.fields

    def tell(done: int, total: int) -> None:
        emit(Event("phase", 0, name=f"augmenting the training rows: {done:,} of {total:,} texts written"))

    result: Augmented | None = None
    if processes.is_main:
        try:
            result = make(rows, making, target, parts=parts, resume=True, on_progress=tell)
        except ConflictError:
            # The folder is this run's by now (`RunDir.claim`), so the file is an earlier run's.
            result = make(rows, making, target, parts=parts, overwrite=True, on_progress=tell)
    processes.barrier()
    return result or make(rows, making, target, parts=parts, resume=True)


def _read(place: str, settings: RunConfig, prepared: Prepared) -> list[dict[str, Any]]:
    """Read the rows of a file as the run's task reads them."""
    path = locate(place)
    table = read_file(path, place)
    columns = {part: name for part, name in settings.data.columns.items() if name in table.columns}
    own = DataSettings(train=place, columns=columns, validation=None, on_bad_row=settings.data.on_bad_row)
    rows = settings.task.read(own, prepared.splits.labels).train
    if not rows:
        raise DataError(f"{place} has no rows", where="data.augment")
    _refuse_leaks(table.rows, prepared.splits, place)
    return [dict(row) for row in rows]


def _refuse_leaks(made: Sequence[Mapping[str, Any]], splits: Splits, file: str) -> None:
    """Raise DataError if a held-out row has a variant in training, which would make the metrics too good."""
    for split in HELD_OUT:
        held = {
            fingerprint(value)
            for row in getattr(splits, split)
            for part, value in row.items()
            if isinstance(value, str) and part != "label"
        }
        leaked = [row for row in made if isinstance(row.get(ORIGIN), Mapping) and row[ORIGIN].get("row") in held]
        if leaked:
            raise DataError(
                f"{len(leaked):,} of {len(made):,} augmented rows were made from {split} rows, or from rows with the "
                "same text",
                where=f"{file}: {str({k: v for k, v in leaked[0].items() if k != ORIGIN})[:160]}",
                hint="augment the training rows alone: graftwerk augment with the run file instead of --data",
            )
