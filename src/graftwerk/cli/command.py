"""From a function to a command: each takes `--json`, `--quiet` and `--debug`, and gets an `Output`."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from graftwerk.cli.output import Output, dump, read, stdout_to_stderr
from graftwerk.errors import ConfigError, RunInterrupted

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of stdout; everything else on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes: results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_COMMON = (("json", Json), ("quiet", Quiet), ("debug", Debug))

Result = dict[str, Any] | None
"""What `--json` prints; None: nothing, for the processes of a launch beside the main one."""


def add_command(app: typer.Typer, function: Callable[..., Result]) -> None:
    """Add ``function(out, ...) -> result`` to the app, under its own name. The result is what `--json` prints.

    The function's other parameters become the command's arguments and options, its docstring up to `Raises` the help.
    A parameter that is a dataclass stands for an option for each of its fields, which several commands share.
    """
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        key: one.annotation for key, one in signature.parameters.items() if is_dataclass(one.annotation)
    }
    own = [one for key, one in signature.parameters.items() if key != "out" and key not in groups]
    own += [option for group in groups.values() for option in _options(group)]

    def run(**values: Any) -> None:
        as_json, quiet, _ = values.pop("json"), values.pop("quiet"), values.pop("debug")  # `main` reads --debug
        out = Output(as_json=as_json, quiet=quiet)
        for key, value in values.items():
            if value == "":
                name = key.replace("_", "-")
                raise ConfigError(f"the value of `{name}` is empty", hint="give one, or leave it out")
        for key, group in groups.items():
            values[key] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        # typer would make exit codes of its own of these two
        try:
            if not as_json:
                function(out, **values)
                return
            with stdout_to_stderr() as stdout:
                result = function(out, **values)
                if result is not None:
                    with read():
                        print(dump(result), file=stdout, flush=True)
        except KeyboardInterrupt:
            raise RunInterrupted(signal.SIGINT, "stopped by Ctrl-C") from None

    common = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for key, annotation in _COMMON
    ]
    run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
    text = (inspect.getdoc(function) or "").partition("\n\nRaises:")[0]
    app.command(function.__name__, help=text, short_help=text.partition("\n")[0])(run)


def _options(group: Any) -> list[inspect.Parameter]:
    """Return the options that the fields of a dataclass stand for."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(group)
    ]
