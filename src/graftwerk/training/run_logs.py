"""The logs of a run: the event log, TensorBoard and trackers, open while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.sanitize import redacted
from graftwerk.training.callbacks.jsonl import JsonLines
from graftwerk.training.callbacks.tensorboard import TensorBoard
from graftwerk.training.callbacks.trackers import SERVICES, Tracking
from graftwerk.training.checkpoint import Snapshot
from graftwerk.training.events import Event, EventBus
from graftwerk.training.run_dir import RunDir


@contextmanager
def open_logs(
    settings: RunConfig, folder: RunDir, bus: EventBus, snapshot: Snapshot | None, early: Sequence[Event]
) -> Iterator[Callable[[], int]]:
    """Open the logs that `training.report_to` names, which hear every event inside the block.

    Args:
        settings: Settings of the run.
        folder: The run folder.
        bus: Event bus that the logs listen to.
        snapshot: Checkpoint that is resumed, or None for a new run.
        early: Events from before the folder was this run's, which a new event log begins with.

    Yields:
        The function that forces the event log to the disk and returns its size in bytes.
    """
    step = 0 if snapshot is None else snapshot.step
    offset = 0 if snapshot is None else int(snapshot.state["log_position"])
    wanted = settings.training.report_to

    def warn(text: str) -> None:
        bus(Event("warning", step, text=text))

    log = JsonLines(folder.log, offset, warn) if "jsonl" in wanted else None
    board = TensorBoard(folder.tensorboard, step if snapshot else None, warn) if "tensorboard" in wanted else None
    writers: list[Any] = [writer for writer in (log, board) if writer is not None]
    tree = redacted(settings.model_dump(mode="json"))
    writers += [
        Tracking(SERVICES[name](), folder.path, tree, resumed=snapshot is not None, on_trouble=warn)
        for name in wanted
        if name in SERVICES
    ]
    bus.listeners.extend(writers)
    try:
        if log is not None and log.missing:
            warn(f"{log.path} is {log.missing:,} bytes shorter than it was at the checkpoint")
        for event in early if log is not None and snapshot is None else ():
            log(event)  # type: ignore[misc]
        yield log.sync if log is not None else lambda: _existing_bytes(folder)
    finally:
        for writer in writers:
            bus.listeners.remove(writer)
            writer.close()


def _existing_bytes(folder: RunDir) -> int:
    """Return the size of the existing event log in bytes, 0 if there is none."""
    return folder.log.stat().st_size if folder.log.is_file() else 0
