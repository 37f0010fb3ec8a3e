"""The stored predictions of a run, read back, filtered and sorted: what the model gets wrong, the worst first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ConflictError, IntegrityError, did_you_mean
from graftwerk.evaluation.answer_files import DELIMITERS, as_cell, flattened
from graftwerk.evaluation.loading import MANIFEST
from graftwerk.evaluation.results_io import ROWS
from graftwerk.evaluation.row_results import ANALYSIS
from graftwerk.own_files import refuse_links
from graftwerk.sanitize import dump_json
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.untrusted_files import checksum, read_sealed
from graftwerk.tasks.spans import OUTSIDE, is_bio

SPLITS = ("test", "validation")
TEXTS = ("text", "text_pair", "anchor", "positive", "source")
"""Names of a row's own texts."""
ENDINGS = (*DELIMITERS, ".jsonl")


def read_errors(
    run: str | Path,
    *,
    split: str | None = None,
    true: str | None = None,
    predicted: str | None = None,
    contains: str | None = None,
    confident: bool = False,
    everything: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the held-out rows of a run that it answers wrongly, the worst first.

    Args:
        run: A run folder.
        split: ``test`` or ``validation``. Default: test if there are such rows.
        true: Only rows with this right label, or an entity of this type.
        predicted: Only rows that are given this label, or an entity of this type.
        contains: Only rows with this in one of their texts, in upper or lower case.
        confident: Sort by the probability of the mistake in place of the size of the error.
        everything: Right rows too.
        limit: Most rows to return, or None for all.

    Returns:
        ``split``, ``rows`` (in the split), ``wrong`` (of them, or None if answers are not right or wrong), ``error``
        (what it counts), ``matching`` (rows that pass the filters) and ``predictions`` (each with ``row``, ``where``,
        its texts, ``true``, ``predicted``, ``error``, ``confidence`` and ``scores``, as far as the task has them).

    Raises:
        ConfigError: There are no predictions, no such split or label, or a filter has no meaning for the task.
        IntegrityError: The files were changed.
    """
    folder, manifest = _run(Path(run))
    analyses = _analyses(folder, manifest)
    split = _split(split, analyses)
    known = analyses[split]
    wrong = known.get("wrong")
    task = manifest.get("task")
    _check_labels(manifest, {"true": true, "predicted": predicted})
    if everything and wrong is None:
        raise ConfigError(f"answers of {task} are not right or wrong, and all rows are listed in any case", where="all")
    records = _records(folder / ROWS / f"{split}.jsonl", known.get("file"))
    if confident and not any(record.get("confidence") is not None for record in records):
        raise ConfigError(
            f"answers of {task} have no probability"
            if records and wrong != 0
            else "no row is wrong, so none is confidently",
            where="confident",
            hint="without it, rows are sorted by the size of their error",
        )
    chosen = [
        record
        for record in records
        if (everything or record.get("wrong") is not False)
        and (true is None or true in _names(record.get("true")))
        and (predicted is None or predicted in _names(record.get("predicted")))
        and (contains is None or any(contains.casefold() in str(record.get(part, "")).casefold() for part in TEXTS))
    ]
    key = "confidence" if confident else "error"
    chosen.sort(key=lambda record: -(record[key] if record.get(key) is not None else -1.0))
    return {
        "split": split,
        "rows": len(records),
        "wrong": wrong,
        "error": known.get("error"),
        "matching": len(chosen),
        "predictions": chosen[:limit],
    }


def write_errors(path: Path, rows: Sequence[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Write rows to a csv, tsv or jsonl file; in csv and tsv each score has a column of its own.

    Raises:
        ConfigError: The ending is another.
        ConflictError: There is such a file already.
        ResourceError: It cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(
            f"rows are not written to a file that ends in `{path.suffix}`",
            where=str(path),
            hint=f"its ending says the form: {', '.join(ENDINGS)}",
        )
    if path.exists() and not overwrite:
        raise ConflictError(f"{path} exists", where=str(path), hint="--overwrite (overwrite=True) replaces it")
    if ending == ".jsonl":
        write_file(path, "".join(dump_json(row) + "\n" for row in rows))
        return
    cells = [flattened(row) for row in rows]
    names = list(dict.fromkeys(name for row in cells for name in row))
    lines = io.StringIO()
    writer = csv.writer(lines, delimiter=DELIMITERS[ending], lineterminator="\n")
    writer.writerows([names, *([as_cell(row.get(name)) for name in names] for row in cells)])
    write_file(path, lines.getvalue().encode("utf-8", "replace"))


def _run(path: Path) -> tuple[Path, dict[str, Any]]:
    if not (path / MANIFEST).is_file():
        if (path.parent / MANIFEST).is_file():  # the adapter of a run
            path = path.parent
        else:
            what = (
                f"{path} is not a run folder: it has no {MANIFEST}" if path.is_dir() else f"there is no folder {path}"
            )
            raise ConfigError(what, hint="give a run folder; an adapter alone keeps no predictions")
    refuse_links(path, (MANIFEST, ROWS))
    return path, read_sealed(path / MANIFEST)


def _analyses(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    if manifest.get("status") != "finished":
        raise ConfigError(
            f"the run in {folder} has no predictions: it is not finished (status: {manifest.get('status')})",
            hint="resume it: graftwerk train ... --resume",
        )
    if not manifest.get("metrics"):
        raise ConfigError(
            f"the run in {folder} held no rows out, so it has no predictions",
            where="data.validation, data.test",
            hint="graftwerk evaluate RUN --data rows.csv measures it on other rows",
        )
    path = folder / ROWS / ANALYSIS
    if not path.is_file():
        raise ConfigError(
            f"the run in {folder} has no predictions of its held-out rows: an older version trained it, or they were "
            "removed",
            where=str(path),
            hint="train it again; or graftwerk predict RUN --data rows.csv --output answers.csv answers rows of a file",
        )
    splits = read_sealed(path).get("splits")
    if not isinstance(splits, dict) or not all(isinstance(known, dict) for known in splits.values()):
        raise IntegrityError(f"{ANALYSIS} holds no splits", where=str(path))
    return splits


def _split(asked: str | None, analyses: Mapping[str, Any]) -> str:
    if asked is None:
        return next(split for split in (*SPLITS, *analyses) if split in analyses)
    if asked not in analyses:
        what = f"there are no {asked} rows in this run" if asked in SPLITS else f"there is no split `{asked}`"
        raise ConfigError(what, where="split", hint=f"there are: {', '.join(analyses)}")
    return asked


def _records(path: Path, written: Any) -> list[dict[str, Any]]:
    if not path.is_file() or checksum(path) != written:
        raise IntegrityError(
            f"{path.name} is {'not what was written: it was damaged or changed' if path.is_file() else 'missing'}",
            where=str(path),
            hint="take it from a copy, or train the run again",
        )
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _check_labels(manifest: Mapping[str, Any], asked: Mapping[str, str | None]) -> None:
    """Raise ConfigError for a label that the run does not have."""
    labels = [str(label) for label in manifest.get("labels") or ()]
    if manifest.get("task") == "token-classification":
        plain = not all(map(is_bio, labels))
        labels = sorted({label if plain else label[2:] for label in labels} - {"", OUTSIDE})
    for where, label in asked.items():
        if label is None or label in labels:
            continue
        if not labels:
            raise ConfigError(f"{manifest.get('task')} has no labels", where=where, hint="leave it out")
        shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
        raise ConfigError(
            f"this run has no label `{label}`",
            where=where,
            hint=did_you_mean(label, labels, f"there are: {shown}"),
        )


def _names(answer: Any) -> list[str]:
    """Return the labels of an answer: a label, a list of them, or of entities."""
    listed = answer if isinstance(answer, list) else [answer]
    return [str(each["label"]) if isinstance(each, dict) else str(each) for each in listed]
