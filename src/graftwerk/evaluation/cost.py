"""Cost of a model: latency, peak memory, size on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graftwerk.devices import synchronize
from graftwerk.evaluation.inference import autocast, evaluation_mode, to_device
from graftwerk.evaluation.peak_memory import peak_memory as peak_memory
from graftwerk.evaluation.peak_memory import resident as resident
from graftwerk.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LATENCY_BATCHES = (1, 32)
"""One row: an answer somebody waits for. Thirty-two: work in bulk."""
WARM_UP = 3
"""Passes before the timed ones: the first pay for kernels, caches and lazily read weights."""


def latency(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batches: int = 10,
    batch_sizes: Sequence[int] = LATENCY_BATCHES,
    dtype: torch.dtype = torch.float32,
) -> dict[int, float]:
    """Measure milliseconds per row by batch size: the median of `batches` timed forward passes, after a warm-up.

    A pass is what happens between encoded rows and logits: padding, transfer to the device, the model. Batches are
    rows of like length, spread evenly over the lengths there are, and the same for every model that is given the same
    rows, so that results can be compared. Tokenizing is not part of it: it costs the same with every adapter. With
    fewer rows than a batch takes, rows are repeated.
    """
    if not examples:
        return {}
    ordered = sorted(range(len(examples)), key=lambda row: (examples[row].length, row))
    timed: dict[int, float] = {}
    devices = {parameter.device for parameter in model.parameters()}
    with evaluation_mode(model), torch.inference_mode(), autocast(model, dtype):
        for size in batch_sizes:
            chosen = [_spread(ordered, size, place, batches) for place in range(batches)]
            for rows in [chosen[place % batches] for place in range(WARM_UP)]:
                _pass(model, task, [examples[row] for row in rows], tokenizer, devices)
            seconds = [_pass(model, task, [examples[row] for row in rows], tokenizer, devices) for rows in chosen]
            timed[size] = 1000 * statistics.median(seconds) / size
    return timed


def _spread(ordered: Sequence[int], size: int, place: int, places: int) -> list[int]:
    """Return the rows of batch number `place` of `places`.

    They are a window on the rows by length, its centre in the middle of its share.
    """
    centre = (place + 0.5) / places * len(ordered)
    first = min(max(int(centre - size / 2), 0), max(len(ordered) - size, 0))
    return [ordered[(first + row) % len(ordered)] for row in range(size)]


def _pass(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    devices: Collection[torch.device],
) -> float:
    synchronize(devices)
    started = time.perf_counter()
    task.objective.forward(model, to_device(task.collator.collate(rows, tokenizer), model))
    synchronize(devices)
    return time.perf_counter() - started


def size_on_disk(path: Path | str) -> int:
    """Return the bytes of a file, or of all files in a folder and below it (links are not followed)."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
