"""Renders a model's chat template; started by `template.py` as a program of its own, never imported.

A chat template is code that came with a model. Here it can do no more harm than not to end or to grow, and both end
this small process: the kernel kills it at its limits of processor time (for each conversation) and memory, whatever it
is doing then. Nothing but JSON goes in and out, one line each way for a list of conversations.

The environment is that of transformers' `apply_chat_template` (sandbox, block trimming, loop controls, `tojson`,
`raise_exception`, the `generation` mark), with two differences: `strftime_now` always gives the same day, so that a
run does not depend on when it was made, and `lipsum` is gone.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

TODAY = datetime.datetime(2025, 1, 1)
CPU_SECONDS = 0.5
"""For one conversation; a real template needs less than a thousandth of it."""
MEMORY_BYTES = 96 << 20
"""Beyond what the process and the conversations take, while one is rendered."""
MOST_MEMORY_BYTES = 2 << 30
MAX_TEMPLATE = 1 << 17
MAX_RENDERED = 1 << 17
"""Characters of a conversation beyond four times those of its turns."""
MAX_SAID = 300
"""Characters of what a template says of itself when it fails."""


class GenerationMark(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` is accepted, and what it holds rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        """Return the nodes between the two marks, as jinja2 asks of an extension."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class PlainNamespace(jinja2.utils.Namespace):
    """Refuses names that begin with an underscore: the sandbox looks at attributes, not at what is stored."""

    def __init__(*args: Any, **values: Any) -> None:
        named = dict(*args[1:], **values)
        for name in named:
            _check(name)
        jinja2.utils.Namespace.__init__(args[0], named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


class MakesDict:
    """Stands for `dict`, whose class attributes a template has no use for."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class Refused(Exception):  # noqa: N818 - said to the parent, not raised to anybody
    """A template that is not rendered, or a conversation that it does not fit."""


def _check(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in the sandbox.

    Raises:
        Refused: it is too long, no template, or takes too much memory.
    """
    if len(source) > MAX_TEMPLATE:
        raise Refused(f"it has {len(source):,} characters; at most {MAX_TEMPLATE:,} are accepted")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMark, jinja2.ext.loopcontrols]
    )
    environment.globals.pop("lipsum")
    environment.globals.update(
        raise_exception=_raise, strftime_now=TODAY.strftime, dict=MakesDict(), namespace=PlainNamespace
    )
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except MemoryError:  # what does not depend on the conversation is computed here
        raise Refused("it takes more memory than a template needs") from None
    except (jinja2.TemplateError, RecursionError) as error:
        raise Refused(f"it is not a template: {_short(error)}") from None


def render(template: jinja2.Template, variables: dict[str, Any], turns: list[list[str]], begin: bool) -> str:
    """Render turns to text; with ``begin``, up to where the model begins its answer."""
    messages = [{"role": role, "content": content} for role, content in turns]
    most = MAX_RENDERED + 4 * sum(len(content) for _, content in turns)
    parts, size = [], 0
    try:
        for part in template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=begin, **variables
        ):
            size += len(part)
            if size > most:
                raise Refused(f"the template makes more than {most:,} characters of {len(turns)} turns")
            parts.append(part)
        text = "".join(parts)
        text.encode()
    except Refused:
        raise
    except MemoryError:
        raise Refused("it takes more memory than a template needs") from None
    except UnicodeEncodeError:
        raise Refused("the template writes half a character (a lone surrogate)") from None
    except Exception as error:  # a template can fail in every way that Python can
        raise Refused(f"the template says: {_short(error)}") from None
    return text


def _short(error: Exception) -> str:
    return str(error)[:MAX_SAID].encode("utf-8", "replace").decode()


def whole(template: jinja2.Template, variables: dict[str, Any], turns: list[list[str]]) -> dict[str, Any]:
    """Return a conversation's text, and where each answer of the assistant begins and its turn ends.

    Found by rendering the turns before it, and these with it: each text must begin with the one before.
    """
    said = [at for at, (role, _) in enumerate(turns) if role == "assistant"]
    pieces = [
        (render(template, variables, turns[:at], True), render(template, variables, turns[: at + 1], False))
        for at in said
    ]
    text = pieces[-1][1]
    if said[-1] + 1 < len(turns):
        text = render(template, variables, turns, False)
    for number, (before, after) in enumerate(pieces, start=1):
        if not after.startswith(before):
            raise Refused("the text with which it makes a model begin an answer is not how it writes answers")
        if not text.startswith(after):
            raise Refused(f"it writes assistant turn {number} otherwise once more turns follow")
    return {"text": text, "spans": [[len(before), len(after)] for before, after in pieces]}


def answer(template: jinja2.Template, variables: dict[str, Any], turns: list[list[str]], asked: bool) -> dict[str, Any]:
    """Return the message to the parent on one conversation: text and spans, or why it is unfit."""
    try:
        if asked:
            return {"text": render(template, variables, turns, True), "spans": []}
        return whole(template, variables, turns)
    except Refused as refused:
        return {"unfit": str(refused)}


def limit() -> None:
    """Limit the process's memory from here on, if the system supports that."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def clock(seconds: float) -> None:
    """Set the limit of processor time in seconds, after which this process is killed, and that of its memory.

    With 0 the clock stops, and the memory is again that of all conversations.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            held = int(stream.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return
    most = min(held + MEMORY_BYTES, MOST_MEMORY_BYTES) if seconds else MOST_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, MOST_MEMORY_BYTES))


def main() -> None:
    """Compile the template that the parent sends, then answer its batches of conversations until the input ends."""
    limit()
    opening = json.loads(sys.stdin.readline())
    clock(CPU_SECONDS)
    try:
        template = compile_template(opening["template"])
    except Refused as refused:
        print(json.dumps({"unfit": str(refused)}), flush=True)
        return
    clock(0)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answers = []
        for turns in asked["conversations"]:
            clock(CPU_SECONDS)
            answers.append(answer(template, opening["variables"], turns, asked["asked"]))
            clock(0)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
