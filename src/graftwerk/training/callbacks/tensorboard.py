"""TensorBoard files with the curves of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.own_files import refuse_links
from graftwerk.training.events import Event


class TensorBoard:
    """Write the scalars of ``step`` and ``evaluation`` events; the library is imported with the first one.

    Args:
        folder: Folder of event files; on resume another file is started, which purges later steps of earlier ones.
        after: Step that a resumed run continues from, or None for a new run.
        on_trouble: Called once, with a text, if files cannot be written.
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
            for name, value in event.values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{prefix}/{name}", value, event.step)
            if event.kind == "evaluation":
                self._writer.flush()
        except OSError as error:
            self._trouble(error)

    def close(self) -> None:
        """Close the files."""
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
                f"TensorBoard files in {self.folder} cannot be written ({error}); training continues without them"
            )
