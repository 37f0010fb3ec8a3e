"""Progress display of a comparison: one live line with bar and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from graftwerk.formatting import duration
from graftwerk.sanitize import clean

EVERY_SECONDS = 5.0
"""Between two plain lines about steps."""


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of a comparison.

    Attributes:
        kind: ``phase`` (the run enters a new phase), ``step``, ``note`` (a message), ``run`` (a run has ended; `text`
            says with which result), ``end``.
        done: Finished runs.
        total: Runs in all.
        run: The active run, as ``lora, seed 0``.
        text: The message.
        step: Steps done by the active run.
        steps: Steps of the active run in all.
        left_seconds: Estimated time to the end of the comparison, or None while unknown.
    """

    kind: Literal["phase", "step", "note", "run", "end"]
    done: int
    total: int
    run: str = ""
    text: str = ""
    step: int = 0
    steps: int = 0
    left_seconds: float | None = None


class Display:
    """A listener that writes progress to a stream (stderr).

    If the stream can no longer be written to, the display falls silent and the comparison continues.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._told = 0.0
        self._silent = False

    def __call__(self, event: ProgressEvent) -> None:
        if self._silent:
            return
        event = replace(event, run=clean(event.run), text=clean(event.text))
        try:
            if self.stream.isatty():
                self._live(event)
            else:
                self._plain(event)
        except (OSError, ValueError):
            self._silent = True

    def close(self) -> None:
        """Remove the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _plain(self, event: ProgressEvent) -> None:
        if event.kind == "phase" and event.run:
            return  # reading, loading, saving of every run: too much for a log
        if event.kind == "step":
            now = time.monotonic()
            if not (event.step and event.steps) or now - self._told < EVERY_SECONDS:
                return
            self._told = now
            text = f"step {event.step}/{event.steps}"
        else:
            text = event.text
        if text:
            position = f"[{event.done}/{event.total}] " if event.total else ""
            run_label = f"{event.run}: " if event.run else ""
            print(f"{position}{run_label}{text}{_remaining(event)}", file=self.stream, flush=True)

    def _live(self, event: ProgressEvent) -> None:
        if self._bar is None:
            self._open()
        if event.kind in ("run", "note") and event.text:
            self._bar.console.print(f"{event.run}: {event.text}" if event.run else event.text, markup=False)
        part = event.step / event.steps if event.steps else 0.0
        what = event.run if event.kind != "phase" else f"{event.run}: {event.text}" if event.run else event.text
        self._bar.update(
            self._task,
            completed=event.done + min(part, 0.99),
            total=max(event.total, 1),
            what=what,
            runs=f"{event.done}/{event.total} runs",
            left=_remaining(event).strip(" ,"),
            refresh=True,
        )
        if event.kind == "end":
            self.close()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[runs]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[what]}", markup=False, style="dim"),
            console=Console(file=self.stream, highlight=False, emoji=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=1, what="", runs="", left="")
        self._bar.start()


def _remaining(event: ProgressEvent) -> str:
    if event.left_seconds is None or event.kind == "end":
        return ""
    return f", {duration(event.left_seconds)} left"
