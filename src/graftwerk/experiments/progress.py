"""Progress display of a comparison: one live line with bar and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from graftwerk.display import Display
from graftwerk.formatting import duration


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


class ComparisonDisplay(Display):
    """A comparison, told by its events; once the stream cannot be written to, nothing more is."""

    def __call__(self, event: ProgressEvent) -> None:
        if self.silent:
            return
        with self.written():
            if self.draws:
                self._live(event)
            else:
                self._plain(event)

    def _plain(self, event: ProgressEvent) -> None:
        if event.kind == "phase" and event.run:
            return  # reading, loading, saving of every run: too much for a log
        text = event.text
        if event.kind == "step":
            if not (event.step and event.steps) or not self.due():
                return
            text = f"step {event.step}/{event.steps}"
        if text:
            position = f"[{event.done}/{event.total}] " if event.total else ""
            run_label = f"{event.run}: " if event.run else ""
            self.line(f"{position}{run_label}{text}{_remaining(event)}")

    def _live(self, event: ProgressEvent) -> None:
        if event.kind in ("run", "note") and event.text:
            self.line(f"{event.run}: {event.text}" if event.run else event.text)
        part = event.step / event.steps if event.steps else 0.0
        what = event.run if event.kind != "phase" else f"{event.run}: {event.text}" if event.run else event.text
        words = (f"{event.done}/{event.total} runs", _remaining(event).strip(" ,"), what)
        self.draw((event.done + min(part, 0.99)) / max(event.total, 1), "  ".join(filter(None, words)))
        if event.kind == "end":
            self.close_bar()


def _remaining(event: ProgressEvent) -> str:
    if event.left_seconds is None or event.kind == "end":
        return ""
    return f", {duration(event.left_seconds)} left"


@contextmanager
def progress_to(
    listener: Callable[[ProgressEvent], None] | None, quiet: bool
) -> Iterator[Callable[[ProgressEvent], None]]:
    """Yield the listener that progress goes to, and close its display at the end.

    Args:
        listener: The caller's own, or None for a display on stderr.
        quiet: Show nothing if there is no listener.
    """
    if listener is not None or quiet:
        yield listener or (lambda event: None)
        return
    display = ComparisonDisplay()
    try:
        yield display
    finally:
        display.close_bar()
