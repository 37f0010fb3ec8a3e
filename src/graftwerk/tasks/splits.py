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
        train, validation, test: Rows; validation and test may be empty.
        labels: For tasks with classes, their names in the order of their ids.
        fingerprint: Hash of the rows of all three splits in order, and of the settings that made them.
        findings: What was noticed while reading (dropped rows, duplicates, leakage).
        origin: Where the rows came from, for the manifest and the model card.
        where: For each split, the place (`file:line`) of a row by its index.
        kept: The key under which `tasks.kept` keeps them; None: they are not kept.
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
        """`file:line` of a row by its index in `rows`, where these are one of the splits."""
        return next((where(at) for split, where in self.where.items() if rows is getattr(self, split)), None)


def splits_of(
    data: DataSettings,
    chosen: Mapping[str, SplitRows],
    findings: Sequence[Issue],
    parts: Sequence[str],
    *,
    labels: tuple[str, ...] | None = None,
) -> Splits:
    """What `read_splits` chose, checked for repeated rows, with its fingerprint.

    Args:
        findings: What was noticed so far.
        parts: What the fingerprint is of: every part of a row that the task reads.
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
        fingerprint=fingerprint_of(rows, parts, labels or ()),
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
    """The same for training rows that are not held in memory; those of validation and test are."""
    held: dict[str, Any] = {split: part.rows for split, part in streamed.held.items()}
    placed = {"train": streamed.repeated, **{split: part.placed() for split, part in streamed.held.items()}}
    counts = {"train": len(streamed.rows), **{split: len(rows) for split, rows in held.items()}}
    return Splits(
        train=streamed.rows,
        **held,
        labels=labels,
        fingerprint=fingerprint_of(held, parts, [*(labels or ()), streamed.digest]),
        issues=(*streamed.issues, *findings, *check_duplicates(placed)),
        origin=origin_of(data, counts),
        where={"train": streamed.rows.where, **{split: part.where for split, part in streamed.held.items()}},
    )
