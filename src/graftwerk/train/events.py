"""What a run says while it runs: events, and the listeners that write them down.

Kinds: ``phase`` (name) and ``progress`` (total, loss, left_seconds) are for people watching and never written down;
``finding`` (about the data), ``start`` (what will be done), ``step`` (loss, learning_rate, grad_norm, epoch, seconds,
left_seconds), ``evaluation`` (metrics, best), ``checkpoint`` (path), ``diagnosis`` (code, text, mend), ``bad_step``,
``memory``, ``early_stopping`` and ``warning`` (text), ``trunk`` (frozen layers that are computed once: `train.trunk`),
``resume`` (path), ``finish``; ``nothing_left`` (text) where
a finished run was to be gone on with. Seconds are of training, counted by a monotonic clock and carried over a resume;
order is the order of the lines.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.errors import EnvironmentFault
from graftwerk.own_files import open_own, refuse_links
from graftwerk.sanitize import clean, dump_json

TRANSIENT = frozenset({"progress", "phase", "nothing_left"})
"""Kinds that are shown and forgotten."""


class Event:
    """Something that happened at a step: ``Event("step", 10, loss=0.61)``."""

    __slots__ = ("figures", "kind", "step")

    def __init__(self, kind: str, step: int, /, **figures: Any) -> None:
        self.kind, self.step, self.figures = kind, step, figures

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **self.figures}

    def __repr__(self) -> str:
        figures = "".join(f", {name}={value!r}" for name, value in self.figures.items())
        return f"Event({self.kind!r}, {self.step}{figures})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]  # figures may be lists


Listener = Callable[[Event], None]
WORTH_A_WARNING = frozenset({"warning", "diagnosis", "bad_step", "memory"})


class Hub:
    """Passes each event on to every listener, in the order in which they were added."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def to_logging(event: Event) -> None:
    """Where nobody listens: what goes wrong is a warning of the logger `graftwerk`."""
    figures = event.figures
    if event.kind in WORTH_A_WARNING or (event.kind == "finding" and figures.get("grave")):
        mend = f" ({figures['mend']})" if figures.get("mend") else ""
        logging.getLogger("graftwerk").warning(
            "step %d: %s", event.step, clean(f"{figures.get('text') or figures.get('message')}{mend}")
        )


class JsonLines:
    """One JSON object per event and line, as it happens.

    A log that cannot be written is no reason to lose a training: whole lines that do not fit are left out and counted
    in ``lost``; ``on_trouble`` is told once, when it begins.

    Args:
        path: The file; its folder exists.
        offset: Where the checkpoint that is gone on from had ended; what lies behind is cut off. None: begin anew.

    Raises:
        EnvironmentFault: the file cannot be opened.
        IntegrityError: it is a link.
    """

    def __init__(self, path: Path, offset: int | None = None, on_trouble: Callable[[str], None] | None = None) -> None:
        self.path, self.lost, self._on_trouble = path, 0, on_trouble
        try:
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
            size = os.fstat(self._descriptor).st_size
            self.position = min(offset or 0, size)
            self.missing = (offset or 0) - self.position
            """Bytes that the checkpoint knew of and that the file no longer has."""
            os.ftruncate(self._descriptor, self.position)
        except OSError as error:
            raise EnvironmentFault(f"the log {path} cannot be opened: {error.strerror}", where=str(path)) from None

    def __call__(self, event: Event) -> None:
        if event.kind in TRANSIENT:
            return
        line = (dump_json(_plain(event.as_dict())) + "\n").encode()
        try:
            written = os.pwrite(self._descriptor, line, self.position)
            if written < len(line):
                os.ftruncate(self._descriptor, self.position)
                raise OSError("the disk is full")
        except OSError as error:
            self.lost += 1
            if self.lost == 1 and self._on_trouble is not None:
                self._on_trouble(
                    f"{self.path} cannot be written ({error.strerror or error}); training goes on without it"
                )
        else:
            self.position += written

    def sync(self) -> int:
        """Forces what was written to the disk and gives the position, for a checkpoint."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if self.lost == 0 and self._on_trouble is not None:
                self._on_trouble(f"{self.path} cannot be forced to the disk: {error.strerror}")
        return self.position

    def close(self) -> None:
        os.close(self._descriptor)


class TensorBoard:
    """Scalars of ``step`` and ``evaluation`` events. The library is imported when the first one comes, not before.

    Args:
        folder: Event files go here; on resume a further file is begun, which takes back what came at or after its step.
        after: The step that a resumed run goes on from.
    """

    def __init__(self, folder: Path, after: int | None = None, on_trouble: Callable[[str], None] | None = None) -> None:
        self.folder, self._after, self._on_trouble = folder, after, on_trouble
        self._writer: Any = None
        self._broken = False

    def __call__(self, event: Event) -> None:
        if event.kind not in ("step", "evaluation") or self._broken:
            return
        prefix = "train" if event.kind == "step" else "validation"
        try:
            if self._writer is None:
                self._writer = self._open()
            for name, value in event.figures.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{prefix}/{name}", value, event.step)
            if event.kind == "evaluation":
                self._writer.flush()
        except OSError as error:
            self._trouble(error)

    def close(self) -> None:
        if self._writer is not None and not self._broken:
            try:
                self._writer.close()
            except OSError as error:
                self._trouble(error)

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        refuse_links(self.folder.parent, (self.folder.name,))
        purge = None if self._after is None else self._after + 1
        return SummaryWriter(str(self.folder), purge_step=purge)

    def _trouble(self, error: OSError) -> None:
        self._broken = True
        if self._on_trouble is not None:
            self._on_trouble(
                f"TensorBoard files in {self.folder} cannot be written ({error}); training goes on without them"
            )


def _plain(value: Any) -> Any:
    """JSON has no NaN; the log must show it all the same. And it is shown to others: its texts are cleaned."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return clean(str(value)) if isinstance(value, str | Path) else value
