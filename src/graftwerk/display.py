"""Progress for who watches: a bar on a terminal and in a notebook, a plain line every few seconds elsewhere.

The one display of the commands and of the functions in Python; what it shows of a training or a comparison is said by
`training/progress_display.py` and `experiments/progress.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Self, TextIO

from graftwerk.formatting import duration
from graftwerk.sanitize import clean

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 140
"""Columns of a table that goes to a file or a pipe, where no terminal says how wide it is."""
EVERY_SECONDS = 5.0
"""Between two plain lines."""
SHORT = 2.0
"""Seconds of work that nobody needs to be told about."""

RowsDone = Callable[[int, int | None], None]


def console(stream: TextIO) -> Console:
    """Return a console without markup; its width is that of the terminal, or fixed if there is no terminal."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False, force_jupyter=False)


def in_notebook() -> bool:
    """Return True in a Jupyter kernel, whose pages show HTML; IPython is not imported for the test."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class Display:
    """Progress display; silent for good once writing fails because the reader has closed the stream.

    Args:
        quiet: Show no progress bar and no lines about progress.
        stream: Stream to write to. Default: stderr; in a notebook stdout, since a page shows stderr as trouble.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.notebook = stream is None and in_notebook()
        self.stream = stream or (sys.stdout if self.notebook else sys.stderr)
        self.quiet, self.silent = quiet, False
        self._bar: Any = None
        self._told = -EVERY_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close_bar()

    @property
    def draws(self) -> bool:
        """True if there is a bar to draw: on a terminal and in a notebook."""
        return self.notebook or self.stream.isatty()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Fall silent for good if what is written inside cannot be."""
        try:
            yield
        except (OSError, ValueError):  # the pipe is broken, or the stream closed
            self.silent = True

    def line(self, text: str) -> None:
        """Write a line above the progress bar, if there is one; control characters are replaced."""
        if self.silent:
            return
        text = clean(text)
        with self.written():
            if self._bar is not None and not self.notebook:
                self._bar.console.print(text)
            else:
                print(text, file=self.stream, flush=True)

    def move(self, what: str, done: int, total: int | None, *figures: str) -> None:
        """Update the progress bar; where none can be drawn, write a line every few seconds and one at the end."""
        if self.quiet or self.silent:
            return
        shown = "  ".join(figure for figure in figures if figure)
        position = f"{done}{'' if total is None else f'/{total}'}"
        ended = total is not None and done >= total
        if self.draws:
            self.draw(None if total is None else done / total if total else 1.0, f"{position}  {shown}", before=what)
            if ended:
                self.close_bar()
        elif ended or self.due():
            self._told = time.monotonic()
            self.line(f"{what} {position}  {shown}".rstrip())

    def due(self) -> bool:
        """Return True at most every few seconds: is it time for another plain line?"""
        now = time.monotonic()
        if now - self._told < EVERY_SECONDS:
            return False
        self._told = now
        return True

    def draw(self, part: float | None, text: str, *, before: str = "") -> None:
        """Draw the bar.

        Args:
            part: Share of the work that is done, or None if it is not known.
            text: Words behind the bar.
            before: Words before it.
        """
        with self.written():
            if self.notebook:
                self._draw_html(part, text, before)
                return
            if self._bar is None:
                self._bar = _terminal_bar(self.stream)
            words = {"text": clean(text), "before": clean(before)}
            total = None if part is None else 1.0
            self._bar.update(self._bar.task_ids[0], completed=part or 0.0, total=total, refresh=True, **words)

    def _draw_html(self, part: float | None, text: str, before: str) -> None:
        from IPython.display import HTML, display

        value = "" if part is None else f' value="{part:.4f}"'
        shown = HTML(f"{escape(clean(before))} <progress{value}></progress> {escape(clean(text))}")
        if self._bar is None:
            self._bar = display(shown, display_id=True)
        else:
            self._bar.update(shown)

    def close_bar(self) -> None:
        """Remove the progress bar, if there is one; in a notebook it stays as it is."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            if not self.notebook:
                with self.written():
                    bar.stop()


def _terminal_bar(stream: TextIO) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.fields[before]}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False),
    )
    bar = Progress(*columns, console=console(stream), transient=True)
    bar.add_task("", total=None, before="", text="")
    bar.start()
    return bar


class Rows(Display):
    """Rows done of all rows, for evaluation and prediction: called with both numbers, the second None if not known.

    The time left counts from the first call: what was done before it (loading a model, rows of an earlier run) says
    nothing of the rows that are left.
    """

    def __init__(self, what: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(quiet=quiet, stream=stream)
        self.what, self._began = what, time.monotonic()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        started, before = self._first = self._first or (now, done)
        if now - self._began < SHORT and self._bar is None:
            return
        left = (now - started) / (done - before) * (total - done) if total is not None and done > before else 0
        self.move(self.what, done, total, f"{duration(left)} left" if left else "")


@contextmanager
def shown_rows(what: str, on_progress: RowsDone | None, quiet: bool) -> Iterator[RowsDone]:
    """Give what a function reports its rows to: the caller's own function, or a display that ends with the block.

    Args:
        what: What is done to the rows, for the display.
        on_progress: The caller's function, or None.
        quiet: Show nothing if there is none.
    """
    if on_progress is not None:
        yield on_progress
        return
    with Rows(what, quiet=quiet) as rows:
        yield rows
