"""Predictions on disk, row by row, so that two runs can be compared on the same rows later.

No pickle: safetensors and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.errors import IntegrityError
from graftwerk.sanitize import dump_json, redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.info import OWN_FILE
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import checksum, read_sealed, read_tensors
from graftwerk.tasks.predictions import (
    ClassPredictions,
    LabelPredictions,
    Predictions,
    ScorePredictions,
    TextPredictions,
)
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

PREDICTIONS, ANSWERS, EVALUATION = "predictions.safetensors", "predictions.jsonl", "evaluation.json"
EXPLANATION = "explanation.json"
"""File with the explanation of a run, for its report."""
ROWS = "predictions"
"""Folder of the predictions of a run's held-out rows, one line each (`row_results.py`)."""
TEXTS = ("texts", "references", "sources", "sets", "languages")
FORMAT = 1
KINDS: tuple[type[Predictions], ...] = (
    ClassPredictions,
    ScorePredictions,
    LabelPredictions,
    TagPredictions,
    SimilarityPredictions,
)
"""Kinds of predictions that tensors alone hold."""


def store_evaluation(run: Path, adapter: Path, result: dict[str, Any], predictions: Predictions) -> None:
    """Write what was measured beside the run's other files; `evaluation.json` comes last and vouches for the other.

    Raises:
        ResourceError: the folder cannot be written.
    """
    kept: dict[str, Any] = {
        "format": FORMAT,
        **result,
        **save_predictions(run, predictions),
        "adapter": checksum(adapter / OWN_FILE),
    }
    write_file(run / EVALUATION, dump_object(redacted(kept), run / EVALUATION, seal=True), own=True)


def load_evaluation(run: Path, adapter: Path) -> tuple[dict[str, Any], Predictions] | None:
    """Load a stored evaluation.

    Returns:
        The results and the predictions that `store_evaluation` wrote, or None if there are none, or if they were
        measured on another adapter than the one in the folder.

    Raises:
        IntegrityError: The files are damaged.
    """
    path = run / EVALUATION
    if not path.is_file():
        return None
    kept = read_sealed(path)
    if kept.get("format") != FORMAT or kept.get("adapter") != checksum(adapter / OWN_FILE):
        return None
    predictions = load_predictions(run, kept)
    return None if predictions is None else (kept, predictions)


def save_predictions(folder: Path, predictions: Predictions, name: str = "predictions") -> dict[str, Any]:
    """Write the predictions of each row.

    Returns:
        ``loss``, and the checksums ``predictions`` and ``answers``, by which `load_predictions` finds them again.

    Raises:
        ResourceError: The folder cannot be written.
    """
    from safetensors.numpy import save

    tensors, answers = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    write_file(tensors, save(predictions.tensors(), {"format": "np"}), own=True)
    if isinstance(predictions, TextPredictions):
        columns = {name: values for name in TEXTS if (values := getattr(predictions, name)) is not None}
        lines = [dump_json(dict(zip(columns, row, strict=True))) for row in _rows(columns)]
        write_file(answers, "".join(line + "\n" for line in lines), own=True)
    return {
        "loss": predictions.loss,
        "predictions": checksum(tensors),
        "answers": checksum(answers) if isinstance(predictions, TextPredictions) else None,
    }


def load_predictions(folder: Path, said: Mapping[str, Any], name: str = "predictions") -> Predictions | None:
    """Load what `save_predictions` wrote, or return None if the files are not the ones that it wrote.

    Args:
        folder: As there.
        said: What it returned, and the ``labels`` of the classes if there are any.
        name: As there.

    Raises:
        IntegrityError: The files are damaged.
    """
    path, lines = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    if not path.is_file() or said.get("predictions") != checksum(path):
        return None
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    kind = next((kind for kind in KINDS if kind.key in tensors), None)
    try:
        if kind is not None:
            return kind.from_tensors(said.get("loss"), tensors, said.get("labels") or ())
    except (KeyError, TypeError, ValueError):
        kind = None
    if not {"nll", "tokens"} <= tensors.keys():
        raise IntegrityError(f"{path.name} holds no scores", where=str(folder))
    if not lines.is_file() or said.get("answers") != checksum(lines):
        return None
    try:  # a line ends at a line feed alone: an answer may hold what else `splitlines` breaks at
        rows = [json.loads(line) for line in lines.read_bytes().split(b"\n")[:-1]]
        columns = {name: tuple(str(row[name]) for row in rows) for name in TEXTS if rows and name in rows[0]}
    except (ValueError, TypeError, KeyError):
        raise IntegrityError(f"{lines.name} holds no answers", where=str(folder)) from None
    return TextPredictions(said.get("loss"), tensors["nll"], tensors["tokens"], **columns)


def _rows(columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, ...]]:
    return zip(*columns.values(), strict=True)
