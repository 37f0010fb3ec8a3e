"""`graftwerk chat`: a conversation with an adapter that writes, in a terminal or a line a turn through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwerk.cli.arguments import Base, Force, RunOrAdapter
from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, read
from graftwerk.errors import GraftwerkError
from graftwerk.sanitize import visible

if TYPE_CHECKING:
    from graftwerk.evaluation.chat import Chat

HELP = """\
/reset  forget the conversation
/base   answers of the base, without the adapter, beside the adapter's; again: no more
/help   this
/exit   leave (also Ctrl-D); Ctrl-C ends an answer, or leaves where none is written
A text that begins with a slash is written with two."""
STYLES = {
    "conversation": "",
    "continuation": "the model has no chat template: it goes on with the text, line after line",
    "single": "each line is a request of its own, which knows nothing of those before",
}


def chat(
    out: Output,
    target: RunOrAdapter,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample, with logits divided by it; default: the likeliest answer.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among tokens of so much probability.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among so many of the likeliest tokens.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens; default: the run's, or 256.", show_default=False)
    ] = None,
    model: Base = None,
    force: Force = False,
) -> Result:
    """Talk to an adapter that writes: several turns, answers as they are written.

    Standard input may be a pipe: a turn a line. /reset, /base, /help and /exit are commands.
    """
    from graftwerk.evaluation.chat import open_chat

    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    out.note("opening the adapter ...")
    opened = open_chat(
        target,
        model=model,
        force=force,
        settings={name: value for name, value in given.items() if value is not None},
    )
    if style := STYLES[opened.style]:
        out.note(style)
    interactive = sys.stdin.isatty()
    if interactive:
        out.note("/help lists the commands")
    session = Session(out, opened, interactive=interactive)
    for line in _terminal() if interactive else sys.stdin:
        if not session.take(line.rstrip("\n")):
            break
    if session.empty:
        out.note(f"{session.empty:,} empty lines were left out")
    return {"predictions": session.turns}


def _terminal() -> Iterator[str]:
    """Yield the lines of a terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys, and the lines before
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


class Session:
    """The turns of one command.

    Args:
        out: Where answers go.
        chat: The conversation.
        interactive: True in a terminal, where Ctrl-C ends an answer only.
    """

    def __init__(self, out: Output, chat: Chat, *, interactive: bool) -> None:
        self.out, self.chat, self.interactive = out, chat, interactive
        self.base = False
        self.turns: list[dict[str, Any]] = []
        self.empty = 0
        self._told: set[str] = set()

    def take(self, line: str) -> bool:
        """Take a line, a command or a turn; return False if it ends the conversation."""
        text = line.strip()
        if not text:
            self.empty += not self.interactive
        elif text == "/exit":
            return False
        elif text == "/help":
            self.out.warn(HELP)
        elif text == "/reset":
            self.chat.reset()
            self.out.note("the conversation starts over")
        elif text == "/base":
            self._switch_base()
        elif text.startswith("/") and not text.startswith("//"):
            self.out.warn(
                f"there is no command {text.split()[0]}: /reset, /base, /help, /exit; // begins a text with /"
            )
        else:
            self._turn(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _switch_base(self) -> None:
        self.base = not self.base
        self.out.note(f"answers of the base: {'on' if self.base else 'off'}")
        if self.base and self.turns and self.chat.history:
            self._base_answer()

    def _turn(self, text: str) -> None:
        try:
            answer = self._shown("adapter", lambda write: self.chat.ask(text, write))
        except GraftwerkError as error:
            if not self.interactive:
                raise
            self.out.warn(str(error))
            return
        self.turns.append({"text": text, "output": answer})
        if self.base:
            self._base_answer()

    def _base_answer(self) -> None:
        from graftwerk.errors import UnsupportedError

        try:
            self.turns[-1]["base"] = self._shown("base", self.chat.ask_base)
        except UnsupportedError as error:
            if not self.interactive:
                raise
            self.base = False
            self.out.warn(str(error))

    def _shown(self, who: str, ask: Callable[[Callable[[str], None]], str]) -> str:
        """Show an answer as it is written, and what was said of it."""
        stream = sys.stderr if self.out.as_json else sys.stdout
        lead = f"{who}: " if self.base else ""

        def write(piece: str) -> None:
            nonlocal lead
            with read():
                stream.write(lead + visible(piece))
                stream.flush()
            lead = ""

        with _answering(self.interactive) as stopped:
            answer = ask(lambda piece: write(stopped(piece)))
        write("\n")
        for note in self.chat.notes:
            if note not in self._told:
                self._told.add(note)
                self.out.note(f"note: {note}")
        return answer


@contextlib.contextmanager
def _answering(interactive: bool) -> Iterator[Callable[[str], str]]:
    """Let the first Ctrl-C end the answer, and only that; yield a function that lets a piece pass until then."""
    from graftwerk.evaluation.chat import AnswerStopped

    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and callable(before):
            before(number, frame)
        asked = True

    def passed(piece: str) -> str:
        if asked:
            raise AnswerStopped
        return piece

    if not interactive:
        yield passed
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield passed
    finally:
        signal.signal(signal.SIGINT, before)
