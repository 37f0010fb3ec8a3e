"""Output of commands: results on stdout, all else on stderr; with `--json` one object as the last line.

Libraries print to stdout too. With `--json` their output is redirected to stderr while the command runs, both Python's
`sys.stdout` and the process's file descriptor, so that stdout holds only the object.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from graftwerk.display import console
from graftwerk.sanitize import as_json, clean, dump_json, redacted, visible
from graftwerk.sanitize import printable as printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class ReaderGone(Exception):  # noqa: N818 - no error
    """Signal that the reader of stdout has closed it, as in `graftwerk ... | head -1`."""


@contextmanager
def read() -> Iterator[None]:
    """Turn a broken pipe while writing the result into `ReaderGone`.

    Raises:
        ReaderGone: The reader has closed stdout.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error


class Output:
    """The two streams of one command.

    Args:
        as_json: Print the result as one JSON object; tables for people go to stderr.
        quiet: Leave out progress and notes; results and errors remain.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def show(self, *things: RenderableType) -> None:
        """Write the result for people: to stdout, or to stderr with `--json`."""
        stream = sys.stderr if self.as_json else sys.stdout
        if stream.isatty():
            console(stream).print(*things, sep="\n")
            return
        held = io.StringIO()
        console(held).print(*things, sep="\n")
        # rich fills every line up to the width of the table
        self.line("\n".join(line.rstrip() for line in held.getvalue().splitlines()))

    def line(self, text: str) -> None:
        """Write a line of the result that is never wrapped or coloured: a path, a number."""
        self.answer(clean(text))

    def answer(self, text: str) -> None:
        """Print a model's output for a text of the user's: nothing in it is taken for a secret."""
        text = visible(text)
        if self.as_json:
            print(text, file=sys.stderr)
            return
        with read():
            print(text)

    def note(self, text: str) -> None:
        """Write a note to stderr, unless `--quiet`."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Write a warning to stderr, even with `--quiet`."""
        print(clean(text), file=sys.stderr, flush=True)


def table(*headings: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """Return an empty plain table; columns named in `numbers` are right-aligned."""
    from rich import box
    from rich.table import Table

    class Cleaned(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(clean(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    made = Cleaned(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return made


@contextmanager
def stdout_to_stderr() -> Iterator[TextIO]:
    """Send everything that anybody prints to stderr; gives the real stdout for the one object."""
    real = sys.stdout
    sys.stdout.flush()
    try:
        descriptor = real.fileno()
        target = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # not files: a test's buffers
        with redirect_stdout(sys.stderr):
            yield real
        return
    saved = os.dup(descriptor)
    with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as stdout:
        os.dup2(target, descriptor)
        try:
            with redirect_stdout(sys.stderr):
                yield stdout
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)


def dump(data: Mapping[str, Any]) -> str:
    """Return one line of strict JSON: no NaN, no infinities, and no secrets except those in rows and answers."""
    said = {key: value if key == "predictions" else redacted(value) for key, value in as_json(data).items()}
    return dump_json(said)
