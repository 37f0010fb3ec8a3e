"""The event log `metrics.jsonl`: one JSON object per line."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.errors import ResourceError
from graftwerk.own_files import open_own
from graftwerk.sanitize import clean, dump_json
from graftwerk.training.events import TRANSIENT, Event


class JsonLines:
    """Write one JSON object per event and line, as it happens.

    A log that cannot be written is no reason to lose a training: whole lines that do not fit are left out and counted
    in ``lost``.

    Args:
        path: The file; its folder exists.
        offset: Size in bytes that the resumed checkpoint knew; the rest is cut off. None starts an empty log.
        on_trouble: Called once, with a text, when a line is lost.

    Attributes:
        lost: Number of lines that could not be written.
        position: Bytes written.

    Raises:
        ResourceError: The file cannot be opened.
        IntegrityError: The file is a link.
    """

    def __init__(self, path: Path, offset: int | None = None, on_trouble: Callable[[str], None] | None = None) -> None:
        self.path, self.lost, self._on_trouble = path, 0, on_trouble
        try:
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
            size = os.fstat(self._descriptor).st_size
            self.position = min(offset or 0, size)
            self.missing = (offset or 0) - self.position
            """Bytes that the checkpoint knew and the file no longer has."""
            os.ftruncate(self._descriptor, self.position)
        except OSError as error:
            raise ResourceError(f"the log {path} cannot be opened: {error.strerror}", where=str(path)) from None

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
                    f"{self.path} cannot be written ({error.strerror or error}); training continues without it"
                )
        else:
            self.position += written

    def sync(self) -> int:
        """Force the written lines to the disk and return the position, for a checkpoint."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if self.lost == 0 and self._on_trouble is not None:
                self._on_trouble(f"{self.path} cannot be forced to the disk: {error.strerror}")
        return self.position

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, texts cleaned; NaN and infinities, which JSON has not, become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return clean(str(value)) if isinstance(value, str | Path) else value
