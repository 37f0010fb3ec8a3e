"""Whether hidden states below the lowest adapted layer are kept, and how many: known before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Plan:
    """What can be said before anything is computed.

    Attributes:
        why_not: Why nothing is kept; None: it will be.
        rows, tokens: Distinct rows, and their tokens.
        bytes: Of their hidden states.
    """

    why_not: str | None
    cut: FrozenPrefix | None = None
    rows: int = 0
    tokens: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
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


def refuse_unless_kept(found: Plan, settings: TrainingSettings) -> None:
    """
    Raises:
        UnsupportedError: `trunk_cache: true` asks for what cannot be.
    """
    if found.why_not is not None and settings.trunk_cache is True:
        raise UnsupportedError(
            f"the layers below what trains cannot be kept: {found.why_not}",
            where="training.trunk_cache",
            hint="auto, or false",
        )


def plan(
    model: Any,
    view: Architecture,
    method: Method,
    heads: Sequence[str],
    task: Task,
    settings: TrainingSettings,
    kept: Sequence[Sequence[Example]],
    passes: float,
    shared: Path | None = None,
) -> Plan:
    """Whether the trunk's hidden states are to be kept, and how much that is; the weights are not looked at.

    Args:
        kept: The rows by split, those of training first.
        passes: How often each row is trained on.
        shared: Folder that other runs share; see `shared_folder`.
    """
    if settings.trunk_cache is False:
        return Plan("training.trunk_cache is false")
    reason: str | None = None
    if isinstance(kept[0], EncodedStream | StreamedRows):
        reason = "the rows are streamed, and not all in memory"
    elif task.collator.redraws:
        reason = "the task draws its rows anew in each epoch"
    elif settings.packing:
        reason = "rows are packed into one, in other company each time"
    try:
        cut = find_frozen_prefix(model, view, method, heads)
    except UnsupportedError as error:
        return Plan(reason or error.what)
    if reason is not None:
        return Plan(reason, cut)
    slots = Slots(kept)
    found = Plan(None, cut, len(slots.rows), slots.tokens, slots.tokens * cut.width * kept_dtype(settings).itemsize)
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


def kept_dtype(settings: TrainingSettings) -> torch.dtype:
    """In which type the states are kept."""
    return DTYPES[settings.trunk_cache_dtype]
