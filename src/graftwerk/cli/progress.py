"""A run told to who watches it: a bar with the time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from graftwerk.cli.figures import count, number, seconds, share
from graftwerk.cli.output import Output, console, printable

if TYPE_CHECKING:
    from graftwerk.train.events import Event

EVERY_SECONDS = 5.0
"""Between two plain lines."""
NOT_SHOWN = frozenset({"loss", "seconds", "best", "left_seconds"})


class Progress:
    """A listener of training events that writes to stderr; used as a context manager.

    A stream that can no longer be written (the reader went away) silences it; the training goes on.

    Args:
        out: With ``quiet`` only findings, warnings and diagnoses are written.
        label: What the steps belong to, where several runs follow one another.
    """

    def __init__(self, out: Output, *, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet, self.silent = out.quiet, False
        self.label = ""
        self._bar: Any = None
        self._task: Any = None
        self._told = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def __call__(self, event: Event) -> None:
        if self.silent:
            return
        try:
            self._tell(event)
        except (OSError, ValueError):  # the pipe is broken, or the stream closed
            self.silent = True

    def _tell(self, event: Event) -> None:
        figures = event.figures
        match event.kind:
            case "phase":
                self._note(f"{figures['name']} ...")
            case "start":
                self._note(describe_start(figures))
            case "progress":
                self._steps(event.step, figures)
            case "evaluation":
                self._note(describe_evaluation(event.step, figures))
            case "resume" | "early_stopping":
                self._note(f"step {event.step}: {event.kind.replace('_', ' ')}: {figures.get('text', '')}".rstrip(": "))
            case "finding" | "diagnosis" | "bad_step" | "memory" | "warning":
                self._line(describe_trouble(event))
            case "finish":
                self._close_bar()

    # -- writing ---------------------------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        if not self.quiet:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, file=self.stream, flush=True)

    def _steps(self, step: int, figures: dict[str, Any]) -> None:
        if self.quiet:
            return
        total, loss, left = figures["total"], figures.get("loss"), figures.get("left_seconds")
        remaining = f"{seconds(left)} left" if left else ""
        if self.stream.isatty():
            if self._bar is None:
                self._open_bar(total)
            self._bar.update(self._task, completed=step, total=total, loss=number(loss), remaining=remaining)
            if step >= total:
                self._close_bar()
            return
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS or step >= total:
            self._told = now
            self._line(f"{self.label}step {step}/{total}  loss {number(loss)}  {remaining}".rstrip())

    def _open_bar(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn(self.label + "training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[remaining]}"),
            console=console(self.stream),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total, loss="–", remaining="")
        self._bar.start()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def describe_evaluation(step: int, figures: dict[str, Any]) -> str:
    shown = ", ".join(
        f"{name} {number(value)}"
        for name, value in figures.items()
        if name not in NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)
    )
    best = " (the best so far)" if figures.get("best") is True else ""
    return f"step {step}: validation {shown}, loss {number(figures.get('loss'))}{best}"


def describe_trouble(event: Event) -> str:
    """A finding about the data, a diagnosis, a warning: what it is, and what to change."""
    figures = event.figures
    text = printable(figures.get("text") or figures.get("message") or "")
    where = f"step {event.step}: " if event.step else ""
    mend = f"\n  mend: {printable(figures['mend'])}" if figures.get("mend") else ""
    example = f"\n  for instance: {printable(figures['example'])}" if figures.get("example") else ""
    return f"{where}{event.kind.replace('_', ' ')}: {text}{example}{mend}"


def describe_start(figures: dict[str, Any]) -> str:
    """What the run will do and cost, before its first step; the time is known after a few of them."""
    parameters = figures["parameters"]
    where = f"{figures['device']}, {figures['compute_type']}"
    if figures["processes"] > 1:
        where += f", {figures['processes']} processes"
    steps = f"{figures['total_steps']:,} steps of {figures['rows_per_step']} rows"
    epochs = f"{figures['steps_per_epoch']:,} an epoch"
    return (
        f"{figures['method']}: trains {count(parameters['trained'])} of {count(parameters['total'])} parameters"
        f" ({share(parameters['share'])}), {count(parameters['head'])} of them in the head\n"
        f"{steps} ({epochs}), learning rate {figures['learning_rate']:g}, on {where}"
    )
