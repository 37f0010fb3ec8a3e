"""The rows of a run in three splits, with what was noticed while they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwerk.data.checks import check_duplicates, missing_in, missing_texts
from graftwerk.data.findings import Issue
from graftwerk.data.near_duplicates import check_near_leakage
from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import SplitRows, fingerprint_of, origin_of
from graftwerk.data.stream import Streamed
from graftwerk.tasks.example import Row


@dataclass(frozen=True)
class Splits:
    """The rows of a run, split once and for all seeds alike.

    Attributes:
        train: Rows to train on.
        validation: Rows to select a checkpoint with; may be empty.
        test: Rows to evaluate on; may be empty.
        labels: Names of the classes in the order of their ids, or None for tasks without classes.
        fingerprint: Hash of the rows of all three splits in order, and of the class names.
        issues: Issues found while reading (dropped rows, duplicates, leakage).
        origin: Sources of the rows, for the manifest and the model card.
        where: For each split, a function from a row's index to its place (`file:line`).
        cache_key: Key of the rows in `tasks.dataset_cache`, or None if they are not cached.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] | None
    fingerprint: str
    issues: tuple[Issue, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    where: Mapping[str, Callable[[int], str]] = field(default_factory=dict)
    cache_key: str | None = None

    def locate(self, rows: Sequence[Row], at: int) -> str | None:
        """Return `file:line` of a row by its index, or None if `rows` is none of the splits."""
        return next((where(at) for split, where in self.where.items() if rows is getattr(self, split)), None)

    def label_settings(self) -> dict[str, Any]:
        """Return the classes as a model's configuration has them: ``num_labels``, ``id2label`` and ``label2id``."""
        names = self.labels or ()
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }


def splits_of(
    data: DataSettings,
    chosen: Mapping[str, SplitRows],
    findings: Sequence[Issue],
    parts: Sequence[str],
    *,
    labels: tuple[str, ...] | None = None,
) -> Splits:
    """Return the splits that `read_splits` chose, checked for repeated rows, with their fingerprint.

    Args:
        data: The settings, for the origin of the rows.
        chosen: The rows by split.
        findings: Issues found so far.
        parts: Names of all fields that the task reads, which the fingerprint covers.
        labels: Names of the classes, or None for tasks without classes.
    """
    rows: dict[str, Any] = {split: part.rows for split, part in chosen.items()}
    placed = {split: part.placed() for split, part in chosen.items()}
    missing = tuple(
        finding
        for split, part in chosen.items()
        for finding in missing_texts(
            split,
            Counter(text for row in rows[split] for text in missing_in(row, part.reading.stratify)),
            len(rows[split]),
        )
    )
    repeated = (*check_duplicates(placed), *check_near_leakage(placed), *missing)
    return Splits(
        **rows,
        labels=labels,
        fingerprint=fingerprint_of(rows, _counted(parts, chosen), labels or ()),
        issues=(*findings, *repeated),
        origin=origin_of(data, {split: len(part) for split, part in rows.items()}),
        where={split: part.where for split, part in chosen.items()},
    )


def splits_of_stream(
    data: DataSettings,
    streamed: Streamed,
    parts: Sequence[str],
    *,
    labels: tuple[str, ...] | None = None,
    findings: Sequence[Issue] = (),
) -> Splits:
    """Return splits with streamed training rows; the rows of validation and test are in memory."""
    held: dict[str, Any] = {split: part.rows for split, part in streamed.held.items()}
    placed = {"train": streamed.repeated, **{split: part.placed() for split, part in streamed.held.items()}}
    counts = {"train": len(streamed.rows), **{split: len(rows) for split, rows in held.items()}}
    return Splits(
        train=streamed.rows,
        **held,
        labels=labels,
        fingerprint=fingerprint_of(held, _counted(parts, streamed.held), [*(labels or ()), streamed.digest]),
        issues=(*streamed.issues, *findings, *check_duplicates(placed)),
        origin=origin_of(data, counts),
        where={"train": streamed.rows.where, **{split: part.where for split, part in streamed.held.items()}},
    )


def _counted(parts: Sequence[str], chosen: Mapping[str, SplitRows]) -> list[str]:
    return list(dict.fromkeys([*parts, *(more for part in chosen.values() for more in part.reading.more_fields)]))
