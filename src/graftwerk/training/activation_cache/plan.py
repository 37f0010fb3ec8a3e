"""Decide, before anything is computed, if hidden states below the lowest adapted layer are cached, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.data.stream import StreamedRows
from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.frozen_layers import FrozenPrefix, find_frozen_prefix
from graftwerk.tasks.base import Example, Task
from graftwerk.training.activation_cache.rows import Slots
from graftwerk.training.activation_cache.store import DTYPES
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.stream import EncodedStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """Decision about the cache, made before anything is computed.

    Attributes:
        why_not: Reason for caching nothing, or None if states are cached.
        cut: Frozen layers that are skipped.
        rows: Number of distinct rows.
        tokens: Number of their tokens.
        bytes: Size of their hidden states.
    """

    why_not: str | None
    cut: FrozenPrefix | None = None
    rows: int = 0
    tokens: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as the log and the manifest have it."""
        skipped, layers = (0, None) if self.cut is None else (self.cut.skipped, self.cut.depth)
        return {
            "on": self.why_not is None,
            "why_not": self.why_not,
            "layers_skipped": skipped,
            "layers": layers,
            "rows": self.rows,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def check_cache_required(found: Plan, settings: TrainingSettings) -> None:
    """Raise unless the settings leave the decision to us, or states are cached.

    Raises:
        UnsupportedError: `trunk_cache: true`, but states cannot be cached.
    """
    if found.why_not is not None and settings.trunk_cache is True:
        raise UnsupportedError(
            f"the layers below the trained ones cannot be cached: {found.why_not}",
            where="training.trunk_cache",
            hint="auto, or false",
        )


def plan(
    model: PreTrainedModel,
    view: Architecture,
    method: Method,
    heads: Sequence[str],
    task: Task,
    settings: TrainingSettings,
    splits: Sequence[Sequence[Example]],
    passes: float,
    shared: Path | None = None,
) -> Plan:
    """Decide if the frozen layers' hidden states are cached, without looking at the weights.

    Args:
        model: Model that is trained; it may be on the meta device.
        view: Architecture of the model.
        method: Method that adapts it.
        heads: Paths of trained heads.
        task: Task that collates the rows.
        settings: Training settings.
        splits: Encoded rows by split, those of training first.
        passes: Number of times that each row is trained on.
        shared: Folder that other runs share; see `shared_folder`.
    """
    if settings.trunk_cache is False:
        return Plan("training.trunk_cache is false")
    reason: str | None = None
    if settings.compile:
        reason = "training.compile runs all layers as one graph"
    elif isinstance(splits[0], EncodedStream | StreamedRows):
        reason = "the rows are streamed, and not all in memory"
    elif task.collator.redraws:
        reason = "the task draws its rows anew in each epoch"
    elif task.collator.several:
        reason = "a row of the task is several texts"
    elif settings.packing:
        reason = "rows are packed into one, with other rows each time"
    try:
        cut = find_frozen_prefix(model, view, method, heads)
    except UnsupportedError as error:
        return Plan(reason or error.what)
    if reason is not None:
        return Plan(reason, cut)
    slots = Slots(splits)
    found = Plan(None, cut, len(slots.rows), slots.tokens, slots.tokens * cut.width * cache_dtype(settings).itemsize)
    if settings.trunk_cache == "auto" and passes <= 1 and shared_folder(settings, shared) is None:
        return Plan("every row is trained on at most once", cut, found.rows, found.tokens, found.bytes)
    return found


def shared_folder(settings: TrainingSettings, shared: Path | None) -> Path | None:
    """Return the folder in which hidden states stay for other runs, None if they are this run's alone.

    Args:
        settings: Training settings, whose ``trunk_cache_dir`` comes first.
        shared: Folder that the caller shares among several runs, such as those of a comparison.
    """
    return shared if settings.trunk_cache_dir is None else Path(settings.trunk_cache_dir).expanduser()


def cache_dtype(settings: TrainingSettings) -> torch.dtype:
    """Return the type in which states are cached."""
    return DTYPES[settings.trunk_cache_dtype]
