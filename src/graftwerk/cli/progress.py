"""A run told to who watches it: a bar with the time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from graftwerk.cli.batch import show_batch
from graftwerk.cli.output import Output, console, printable
from graftwerk.formatting import count, duration, number, share
from graftwerk.sanitize import clean

if TYPE_CHECKING:
    from graftwerk.training.events import Event

EVERY_SECONDS = 5.0
"""Between two plain lines."""
SHORT = 2.0
"""Seconds of work that nobody needs to be told about."""
NOT_SHOWN = frozenset({"loss", "seconds", "best", "left_seconds"})


class Display:
    """Progress display on stderr; silent for good once writing fails because the reader has closed it.

    Args:
        out: The command's output; with its ``quiet`` no progress bar is shown.
        stream: Stream to write to, or None for stderr.
    """

    def __init__(self, out: Output, *, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet, self.silent = out.quiet, False
        self._bar: Any = None
        self._task: Any = None
        self._told = -EVERY_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_bar()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the pipe is broken, or the stream closed
            self.silent = True

    def line(self, text: str) -> None:
        """Write a line above the progress bar, if there is one; control characters are replaced."""
        if self.silent:
            return
        text = clean(text)
        with self._written():
            if self._bar is not None:
                self._bar.console.print(text)
            else:
                print(text, file=self.stream, flush=True)

    def move(self, what: str, done: int, total: int | None, *figures: str) -> None:
        """Update the progress bar; without a terminal, write a line every few seconds and one at the end."""
        if self.quiet or self.silent:
            return
        shown = "  ".join(figure for figure in figures if figure)
        if self.stream.isatty():
            with self._written():
                if self._bar is None:
                    self._open_bar(what, total)
                self._bar.update(self._task, completed=done, total=total, figures=shown)
                if total is not None and done >= total:
                    self.close_bar()
            return
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS or (total is not None and done >= total):
            self._told = now
            self.line(f"{what} {done}{'' if total is None else f'/{total}'}  {shown}".rstrip())

    def _open_bar(self, what: str, total: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Bar(*columns, console=console(self.stream), transient=True)
        self._task = self._bar.add_task(what, total=total, figures="")
        self._bar.start()

    def close_bar(self) -> None:
        """Remove the progress bar, if there is one."""
        if self._bar is not None:
            bar, self._bar, self._task = self._bar, None, None
            with self._written():
                bar.stop()


class Rows(Display):
    """Rows done of all rows, for evaluation and prediction: called with both numbers, the second None if not known.

    The time left counts from the first call: what was done before it (loading a model, rows of an earlier run) says
    nothing of the rows that are left.
    """

    def __init__(self, out: Output, what: str, *, stream: TextIO | None = None) -> None:
        super().__init__(out, stream=stream)
        self.what, self._began = what, time.monotonic()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        started, before = self._first = self._first or (now, done)
        if now - self._began < SHORT and self._bar is None:
            return
        left = (now - started) / (done - before) * (total - done) if total is not None and done > before else 0
        self.move(self.what, done, total, f"{duration(left)} left" if left else "")


class Progress(Display):
    """A run, told by its events. With ``quiet`` only findings, warnings and diagnoses are written."""

    def __call__(self, event: Event) -> None:
        values = event.values
        match event.kind:
            case "phase":
                self._note(f"{values['name']} ...")
            case "first_batch":
                if not self.quiet and not self.silent:
                    with self._written():
                        show_batch(values, self.stream)
            case "start":
                self._note(describe_start(values))
            case "progress":
                left = values.get("left_seconds")
                loss = f"loss {number(values.get('loss'))}"
                self.move("step", event.step, values["total"], loss, f"{duration(left)} left" if left else "")
            case "evaluation":
                self._note(describe_evaluation(event.step, values))
            case "resume":
                self._note(f"resuming from step {event.step}: {values.get('path', '')}")
            case "nothing_left" | "trunk":
                self._note(values["text"])
            case "early_stopping":
                self._note(f"step {event.step}: stopping early: {values.get('text', '')}")
            case "finding" | "diagnosis" | "bad_step" | "memory" | "warning":
                self.line(describe_trouble(event))
            case "finish":
                self.close_bar()

    def _note(self, text: str) -> None:
        if not self.quiet:
            self.line(text)


def describe_evaluation(step: int, values: dict[str, Any]) -> str:
    """Return a line on an evaluation during training: step, metrics, loss, and whether it is the best so far."""
    shown = ", ".join(
        f"{name} {number(value)}"
        for name, value in values.items()
        if name not in NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)
    )
    best = " (the best so far)" if values.get("best") is True else ""
    return f"step {step}: validation {shown}, loss {number(values.get('loss'))}{best}"


def describe_trouble(event: Event) -> str:
    """Return the text of an issue, a diagnosis or a warning, with its hint."""
    values = event.values
    text = printable(values.get("text") or values.get("message") or "")
    where = f"step {event.step}: " if event.step else ""
    hint = f"\n  hint: {printable(values['hint'])}" if values.get("hint") else ""
    example = f"\n  for instance: {printable(values['example'])}" if values.get("example") else ""
    return f"{where}{event.kind.replace('_', ' ')}: {text}{example}{hint}"


def describe_start(values: dict[str, Any]) -> str:
    """Return a summary of a run before its first step: parameters, steps, learning rate, device."""
    parameters = values["parameters"]
    where = f"{values['device']}, {values['compute_type']}"
    if (base := values["model_dtype"]) != "float32" or values["compute_type"] != base:
        where += f", base in {base}"
    if values["processes"] > 1:
        where += f", {values['processes']} processes"
    steps = f"{values['total_steps']:,} steps of {values['rows_per_step']} rows"
    epochs = f"{values['steps_per_epoch']:,} an epoch"
    leaves = "".join(f"\nleaves out {text}" for text in values.get("left_out", ()))
    return (
        f"{values['method']}: trains {count(parameters['trained'])} of {count(parameters['total'])} parameters"
        f" ({share(parameters['share'])}), {count(parameters['head'])} of them in the head{leaves}\n"
        f"{steps} ({epochs}), learning rate {values['learning_rate']:g}, on {where}"
    )
