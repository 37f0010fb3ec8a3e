"""Augmented rows as a file of their own, written whole or not at all, and resumed where making them was stopped.

Three files: ``NAME.jsonl`` has the rows; ``NAME.about.json`` beside it says what they were made of and vouches for
them by a checksum; ``NAME.jsonl.unfinished`` is there while a model is still writing. The same rows and settings
always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwerk.augmentation.filters import REASONS
from graftwerk.augmentation.progress_log import FORMAT, Journal, journal_of
from graftwerk.augmentation.rows import ORIGIN, Made, Row, make_noise, make_translations
from graftwerk.augmentation.settings import Augmenter, Generation, Noise
from graftwerk.data.keyed_rng import chance
from graftwerk.errors import ConfigError, ConflictError, IntegrityError
from graftwerk.own_files import refuse_link
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Augmented:
    """Augmented rows on disk.

    Attributes:
        path: The file.
        parts: The rows of each augmenter, in the augmenters' order; each row has its `origin`.
        counts: For each augmenter ``{kind, read, made, left_out: {reason: variants}}``.
        fingerprint: Of the file's bytes.
        found: It was there already, and is exactly what was asked for.
    """

    path: Path
    parts: tuple[tuple[dict[str, Any], ...], ...]
    counts: tuple[dict[str, Any], ...]
    fingerprint: str
    found: bool

    @property
    def rows(self) -> int:
        """Return the number of augmented rows, all augmenters together."""
        return sum(map(len, self.parts))

    def to_dict(self) -> dict[str, Any]:
        """Return the summary that `graftwerk augment --json` prints."""
        return {
            "file": str(self.path),
            "rows": self.rows,
            "made": list(self.counts),
            "fingerprint": self.fingerprint,
            "found": self.found,
        }

    def sentences(self) -> list[str]:
        """Return the numbers of rows made and of variants left out, as sentences."""
        said = []
        for made in self.counts:
            said.append(f"{made['kind']}: {made['made']:,} rows from {made['read']:,}")
            said += [
                f"{made['kind']}: {count:,} left out: the variant {REASONS[reason]}"
                for reason, count in made["left_out"].items()
            ]
        return said


def make(
    rows: Sequence[Row],
    augmenters: Sequence[Augmenter],
    target: Path,
    *,
    parts: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Augmented:
    """Write augmented rows, or return those that exist already of the same rows and settings.

    Args:
        rows: Training rows; not changed.
        augmenters: Each makes rows from ``rows``; none sees the rows of another.
        target: The file to write.
        parts: Names of the task's fields, the one that the model reads first; if empty, usual names are tried.
        resume: Continue an interrupted file; a finished one is returned as it is.
        overwrite: Replace an existing file.
        on_progress: Called with (rows done, rows in all) while a model generates.

    Raises:
        ConflictError: A finished or interrupted file exists without `resume` or `overwrite`, or it is of other rows or
            settings, or another process is writing it.
        ConfigError, DataError: An augmenter does not fit the rows.
        ModelError, AdapterError, ResourceError, IntegrityError: As for loading models.
    """
    identity = identity_of(rows, augmenters)
    refuse_link(about_of(target))
    if not overwrite:
        if (ready := _finished(target, identity, resume)) is not None:
            return ready
        if journal_of(target).exists() and not resume:
            raise ConflictError(
                f"{target} was begun and is not finished",
                hint="--resume (resume=True) continues it, --overwrite (overwrite=True) starts over",
                recovered=str(journal_of(target)),
            )
    _refuse_twice(rows)
    made: list[Made] = []
    needed = any(isinstance(augmenter, Generation) for augmenter in augmenters)
    journal = Journal(target, identity, keep=resume and not overwrite) if needed else None
    try:
        for place, augmenter in enumerate(augmenters):
            if isinstance(augmenter, Noise):
                made.append(make_noise(augmenter, rows, parts))
            else:
                assert isinstance(augmenter, Generation)
                assert journal is not None
                made.append(make_translations(augmenter, rows, parts, journal, str(place), on_progress))
        result = _write(target, identity, made)
        if journal is not None:
            journal.remove()
        return result
    finally:
        if journal is not None:
            journal.close()


def identity_of(rows: Sequence[Row], augmenters: Sequence[Augmenter]) -> dict[str, Any]:
    """Return what determines the bytes of a file: a hash of the rows, their number, and the augmenters."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
    return {
        "rows": digest.hexdigest(),
        "read": len(rows),
        "augmenters": redacted([augmenter.making() for augmenter in augmenters]),
    }


def weighted(rows: Sequence[dict[str, Any]], weight: float) -> list[dict[str, Any]]:
    """Repeat each row ``weight`` times; a hash of the row's text decides for the fractional part."""
    used = []
    for row in rows:
        whole = int(weight)
        drawn = chance("weight", json.dumps(row, sort_keys=True, default=str)).random()
        used += [row] * (whole + (drawn < weight - whole))
    return used


def about_of(target: Path) -> Path:
    """Return the path of the file that describes an augmented file: ``rows.about.json`` beside ``rows.jsonl``."""
    return target.with_name(target.stem + ".about.json")


def _finished(target: Path, identity: Mapping[str, Any], resume: bool) -> Augmented | None:
    """Return the finished file if it exists, is intact, and is of these rows and settings.

    Raises:
        ConflictError: it is there and ``resume`` was not said, or it is something else.
        IntegrityError: it was changed since it was made.
    """
    if not target.exists():
        return None
    about = read_json(about_of(target)) if about_of(target).is_file() else None
    if about is None and resume and journal_of(target).exists():
        return None  # killed between the rows and what is said about them
    if about is None or not resume:
        raise ConflictError(
            f"there is a file {target}",
            hint="--resume (resume=True) takes it if it is what is asked for, --overwrite (overwrite=True) replaces it",
            recovered=str(target),
        )
    changed = _differences(about.get("identity"), identity)
    if about.get("format") != FORMAT or changed:
        raise ConflictError(
            f"{target} was made of something else: {changed}",
            hint="give another file, or replace it with --overwrite (overwrite=True)",
            recovered=str(target),
        )
    content = target.read_bytes()
    if hashlib.sha256(content).hexdigest() != about.get("sha256"):
        raise IntegrityError(
            f"{target} is not the file that was made: it was damaged or changed",
            where=str(about_of(target)),
            hint="make it again with --overwrite (overwrite=True); to train on changed rows, name the file itself: "
            "data.augment: [{name: file, path: ...}]",
        )
    parts, start = [], 0
    try:
        listed = [json.loads(line) for line in content.split(b"\n")[:-1]]
        for counted in about["made"]:
            parts.append(tuple(listed[start : start + counted["made"]]))
            start += counted["made"]
    except (ValueError, TypeError, KeyError):
        raise IntegrityError(f"{about_of(target)} does not say what it should", where=str(target)) from None
    return Augmented(target, tuple(parts), tuple(about["made"]), about["sha256"], True)


def _differences(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, Mapping):
        return "what, it does not say"
    said = []
    if before.get("rows") != now["rows"]:
        said.append(f"other rows ({before.get('read')} then, {now['read']} now)")
    if before.get("augmenters") != now["augmenters"]:
        said.append(f"other settings ({json.dumps(before.get('augmenters'))})")
    return " and ".join(said)


def _write(target: Path, identity: Mapping[str, Any], made: Sequence[Made]) -> Augmented:
    content = "".join(
        json.dumps(row, ensure_ascii=False, default=str) + "\n" for one in made for row in one.rows
    ).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(content).hexdigest()
    counts = [one.counts() for one in made]
    about = {"format": FORMAT, "sha256": digest, "made": counts, "identity": identity}
    told = dump_object(about, about_of(target))
    write_file(target, content)
    write_file(about_of(target), told, own=True)
    return Augmented(target, tuple(tuple(one.rows) for one in made), tuple(counts), digest, False)


def _refuse_twice(rows: Sequence[Row]) -> None:
    """Raise ConfigError for rows with a column `origin`.

    Augmented rows store their source there, so such a row is augmented already, or uses the name for something else.
    """
    with_origin = sum(ORIGIN in row for row in rows)
    if with_origin:
        raise ConfigError(
            f"{with_origin:,} of {len(rows):,} rows have a column `{ORIGIN}`, as augmented rows have",
            hint="augment the rows that these were made from; or call that column something else",
        )
