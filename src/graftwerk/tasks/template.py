"""Conversations as texts: the model's own chat template, or a plain one; and where in a text each answer stands.

The plain template, for models that have none (``bos`` where the tokenizer begins texts with one)::

    [bos]{system}⏎⏎### Instruction:⏎{user}⏎⏎### Response:⏎{assistant}[eos]⏎⏎### Instruction:⏎...

A model's template is code from outside. It is rendered by `template_worker.py`, in a process of its own with limits of
memory and processor time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwerk.errors import ConfigError, IntegrityError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Sequence[str]
"""``(role, content)``; roles are ``system``, ``user`` and ``assistant``."""
Choice = Literal["auto", "chat", "plain"]
CHUNK = 64
"""Conversations sent to the process at once."""
INSTRUCTION, RESPONSE = "### Instruction:\n", "### Response:\n"


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered by a chat template.

    Attributes:
        text: The text.
        spans: For each assistant turn, the characters at which its answer begins and the turn ends.
        unfit: Why the conversation could not be rendered, or None if it was.
    """

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    unfit: str | None = None


class Template(ABC):
    """Final subclasses: `PlainTemplate`, `ModelTemplate`."""

    name: str
    end_ids: list[int | None] | None = None
    """Ids that end an answer, once they were looked for (`chat.end_ids`)."""

    @abstractmethod
    def render(self, conversations: Sequence[Sequence[Turn]], *, asked: bool = False) -> list[Rendered]:
        """Render conversations, in order.

        Args:
            conversations: Turns (role, content) of each.
            asked: The texts end where the model is to begin an answer, and have no spans.

        Raises:
            IntegrityError: the template does not end, or takes more memory than a template needs.
        """


class PlainTemplate(Template):
    """The template of models that have none: `### Instruction:` before a request, `### Response:` before an answer."""

    name = "plain"

    def __init__(self, bos: str, eos: str) -> None:
        self.bos, self.eos = bos, eos

    def render(self, conversations: Sequence[Sequence[Turn]], *, asked: bool = False) -> list[Rendered]:
        return [self._one(turns, asked) for turns in conversations]

    def _one(self, turns: Sequence[Turn], asked: bool) -> Rendered:
        text, spans, gap = self.bos, [], ""
        for role, content in turns:
            if role == "assistant":
                text += gap + RESPONSE
                begin = len(text)
                text += content + self.eos
                spans.append((begin, len(text)))
            else:
                text += gap + (INSTRUCTION if role == "user" else "") + content
            gap = "\n\n"
        return Rendered(text + gap + RESPONSE if asked else text, tuple(spans))


class ModelTemplate(Template):
    """The template that came with a tokenizer. Its process begins with the first conversation and ends with this."""

    name = "chat"

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        self._opening: dict[str, Any] = {"template": source, "variables": variables}
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def __reduce__(self) -> tuple[type[ModelTemplate], tuple[str, dict[str, Any]]]:
        """Copy without the process, so that the tokenizer that holds this can be copied and pickled."""
        return ModelTemplate, (self._opening["template"], self._opening["variables"])

    def render(self, conversations: Sequence[Sequence[Turn]], *, asked: bool = False) -> list[Rendered]:
        return [rendered for chunk in _chunks(conversations) for rendered in self._ask(chunk, asked)]

    def _ask(self, conversations: Sequence[Sequence[Turn]], asked: bool) -> Iterator[Rendered]:
        question = {"conversations": [[list(turn) for turn in turns] for turns in conversations], "asked": asked}
        for answer in self._exchange(self._started(), question):
            if "unfit" in answer:
                yield Rendered(unfit=answer["unfit"])
            else:
                yield Rendered(answer["text"], tuple((begin, end) for begin, end in answer["spans"]))

    def _started(self) -> subprocess.Popen[str]:
        # A forked copy of this process must not talk into the same pipes.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        # A session of its own: Ctrl-C is for the run, which stops between two steps. `-I`: no path of the user's.
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        weakref.finalize(self, _end, process)
        self._process, self._owner = process, os.getpid()
        if refused := self._exchange(process, self._opening).get("unfit"):
            raise ModelError(
                f"the chat template of the model cannot be used: {refused}",
                where="chat_template",
                hint="task.template=plain uses a plain one",
            )
        return process

    def _exchange(self, process: subprocess.Popen[str], question: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = process.wait()
        slow = hasattr(signal, "SIGPROF") and code == -signal.SIGPROF
        raise IntegrityError(
            "the chat template of the model was refused: it "
            + ("does not end within half a second" if slow else "takes more memory than a template needs"),
            where="chat_template",
            hint="if the model came from somebody else, do not trust it; task.template=plain uses a plain one",
        )


def template_for(tokenizer: PreTrainedTokenizerBase, choice: Choice = "auto") -> Template:
    """Return the template that renders conversations for a model.

    Args:
        tokenizer: The model's tokenizer.
        choice: Which template; ``auto`` means the model's own if it has one, else the plain one.

    Raises:
        ConfigError: The model's own is requested, and it has none.
        ModelError: the tokenizer has no end token.
    """
    known: dict[str, Template] = vars(tokenizer).setdefault(_KNOWN, {})
    if choice not in known:
        known[choice] = _template(tokenizer, choice)
    return known[choice]


_KNOWN = "_graftwerk_templates"
"""Attribute of a tokenizer: its templates by choice, so that a process is started once."""


def _template(tokenizer: PreTrainedTokenizerBase, choice: Choice) -> Template:
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    if choice == "chat" and not source:
        raise ConfigError(
            "the model has no chat template", where="task.template", hint="task.template=plain uses a plain one"
        )
    if source and choice != "plain":
        return ModelTemplate(source, _variables(tokenizer))
    if not tokenizer.eos_token:
        raise ModelError("the tokenizer has no end token, so no answer could ever end")
    return PlainTemplate(tokenizer.bos_token if adds_bos(tokenizer) else "", tokenizer.eos_token)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer adds its beginning-of-sequence token to every text."""
    return bool(
        tokenizer.bos_token_id is not None
        and (ids := tokenizer("a", verbose=False)["input_ids"])
        and ids[0] == tokenizer.bos_token_id
    )


def _variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the special tokens by the names that templates use."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _chunks(conversations: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(conversations), CHUNK):
        yield conversations[start : start + CHUNK]


def _end(process: subprocess.Popen[str]) -> None:
    """A process without work ends when its input does."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
    process.wait()
