"""Evaluation on several processes: batches dealt out, predictions put back into the order of the rows.

Legend: P processes, N rows of all processes, n rows of one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graftwerk.tasks.base import Predictions
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.tag_predictions import NOBODY
from graftwerk.training.distributed.protocol import Distributed


def deal_batches(batches: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """Return the rows of each process, in the order in which it evaluates them.

    Whole batches are dealt, each process taking every ``world_size``-th, so that a batch has the same rows (and scores
    round alike) however many processes there are.
    """
    return [[row for batch in batches[rank::world_size] for row in batch] for rank in range(world_size)]


def gather_predictions(processes: Distributed, own: Predictions, shares: Sequence[Sequence[int]]) -> Predictions:
    """Return the predictions of all processes in the order of the rows, on every process.

    Args:
        processes: The processes that evaluate together.
        own: This process's predictions on its share.
        shares: Rows of each process, as `deal_batches` returns them.

    Returns:
        Predictions on all rows; the loss is the mean over all of them.
    """
    if isinstance(own, TextPredictions):
        return _gather_texts(processes, own, shares)
    gathered: dict[str, Any] = {
        name: _gather_array(processes, _widened(processes, value), shares)
        for name in own.arrays
        if name not in own.whole and (value := getattr(own, name)) is not None
    }
    if own.loss is None:
        return replace(own, **gathered)
    sums = torch.tensor([own.loss * own.num_targets, own.num_targets], device=processes.device)  # (2,)
    total, count = processes.sum(sums).tolist()
    return replace(own, loss=total / count, **gathered)


def _gather_texts(processes: Distributed, own: TextPredictions, shares: Sequence[Sequence[int]]) -> TextPredictions:
    nll, tokens = (_gather_array(processes, each, shares) for each in (own.nll, own.tokens))  # (N,), (N,)
    columns: dict[str, tuple[str, ...] | None] = {}
    for name in ("texts", "references", "sources", "sets", "languages"):
        values = getattr(own, name)
        if values is None:
            columns[name] = None
            continue
        placed = {
            row: value
            for rows, part in zip(shares, gather_lists(processes, list(values)), strict=True)
            for row, value in zip(rows, part, strict=True)
        }
        columns[name] = tuple(placed[row] for row in range(len(placed)))
    loss = None if own.loss is None else float(nll.sum() / max(int(tokens.sum()), 1))
    return TextPredictions(loss, nll, tokens, **columns)


def _widened(processes: Distributed, own: np.ndarray) -> np.ndarray:
    """Return rows of words, (n, W), as wide as the widest of any process; other arrays have one width already."""
    if own.ndim != 2:
        return own
    widest = int(processes.gather(torch.tensor(own.shape[1], device="cpu")).max())
    return np.pad(own, [(0, 0), (0, widest - own.shape[1])], constant_values=NOBODY)


def gather_lists(processes: Distributed, own: list[Any]) -> list[list[Any]]:
    """Return every process's list of plain values; they travel as JSON, nothing is pickled."""
    text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)  # (bytes,)
    sizes = processes.gather(torch.tensor(len(text), device="cpu")).tolist()
    padded = torch.nn.functional.pad(text, (0, max(sizes) - len(text)))
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(processes.gather(padded), sizes, strict=True)]


def _gather_array(processes: Distributed, own: np.ndarray, shares: Sequence[Sequence[int]]) -> np.ndarray:
    """Return each process's values (n, ...) in the places of its rows, (N, ...) on every process."""
    missing = max(map(len, shares)) - len(own)  # gathering needs equal shapes
    padded = np.pad(own, [(0, missing), *[(0, 0)] * (own.ndim - 1)])
    gathered = processes.gather(torch.from_numpy(padded)).cpu().numpy()  # (P, n, ...)
    placed = np.empty((sum(map(len, shares)), *own.shape[1:]), dtype=own.dtype)
    for rows, part in zip(shares, gathered, strict=True):
        placed[list(rows)] = part[: len(rows)]
    return placed
