"""Predictions on disk, row by row, so that two runs can be compared on the same rows later. No pickle: safetensors
and JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from graftwerk.errors import IntegrityError
from graftwerk.store.atomic import write_file
from graftwerk.store.info import OWN_FILE, checksum
from graftwerk.store.safety import read_json, read_tensors
from graftwerk.tasks.base import Predictions

PREDICTIONS, EVALUATION = "predictions.safetensors", "evaluation.json"
FORMAT = 1


def store_evaluation(run: Path, adapter: Path, result: dict[str, Any], predictions: Predictions) -> None:
    """Write what was measured beside the run's other files; `evaluation.json` comes last and vouches for the other.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    from safetensors.numpy import save

    tensors = {"scores": np.ascontiguousarray(predictions.scores, dtype=np.float64)}
    if predictions.targets is not None:
        tensors["targets"] = np.ascontiguousarray(predictions.targets, dtype=np.int64)
    write_file(run / PREDICTIONS, save(tensors, {"format": "np"}))
    kept = {
        "format": FORMAT,
        **result,
        "loss": predictions.loss,
        "adapter": checksum(adapter / OWN_FILE),
        "predictions": checksum(run / PREDICTIONS),
    }
    write_file(run / EVALUATION, json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_evaluation(run: Path, adapter: Path) -> tuple[dict[str, Any], Predictions] | None:
    """What `store_evaluation` wrote; None where nothing was, or where it was measured on another adapter than lies
    there.

    Raises:
        IntegrityError: the files are damaged.
    """
    path = run / EVALUATION
    if not path.is_file():
        return None
    kept = read_json(path)
    if kept.get("format") != FORMAT or kept.get("adapter") != checksum(adapter / OWN_FILE):
        return None
    if not (run / PREDICTIONS).is_file() or kept.get("predictions") != checksum(run / PREDICTIONS):
        return None
    tensors = read_tensors(run / PREDICTIONS)
    if "scores" not in tensors:
        raise IntegrityError(f"{PREDICTIONS} holds no scores", where=str(run))
    targets = tensors["targets"].numpy() if "targets" in tensors else None
    return kept, Predictions(tensors["scores"].numpy(), targets, kept.get("loss"))
