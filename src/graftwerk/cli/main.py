"""The entry point: which commands there are, and what becomes of an error.

A command's module is imported here, but nothing heavy stands at the top of one: `graftwerk --help` imports neither
torch nor pydantic nor transformers.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from graftwerk.cli import (
    ablate,
    augment,
    chat,
    combine,
    compare,
    doctor,
    errors,
    evaluate,
    explain,
    export,
    init,
    inspect,
    methods,
    plan,
    predict,
    recommend,
    report,
    schema,
    search,
    sequence,
    train,
)
from graftwerk.cli.command import add_command
from graftwerk.cli.output import ReaderGone, dump, read
from graftwerk.errors import ConfigError, ErrorReport, GraftwerkError, ResourceError, RunInterrupted
from graftwerk.sanitize import clean
from graftwerk.training.signals import StopSignals

BROKEN_PIPE = 128 + signal.SIGPIPE
_NAMES_AT_FAULT = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}

app = typer.Typer(
    name="graftwerk",
    help="Adapt pretrained Hugging Face models to your own data by training a small part of them, "
    "and compare the ways honestly.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    """Print the version if it is asked for; commands are run by typer."""
    if version:
        import graftwerk

        print(graftwerk.__version__)
        raise typer.Exit


for function in (
    init.init,
    train.train,
    evaluate.evaluate,
    plan.plan,
    recommend.recommend,
    predict.predict,
    chat.chat,
    combine.combine,
    augment.augment,
    compare.compare,
    search.search,
    ablate.ablate,
    sequence.sequence,
    export.merge,
    export.export,
    export.push,
    inspect.inspect,
    explain.explain,
    methods.methods,
    doctor.doctor,
    schema.schema,
    report.report,
    errors.errors,
):
    add_command(app, function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; nothing is raised.

    0 done; 2 usage or configuration; 3 data; 4 model or adapter do not fit; 5 environment; 6 diverged; 7 conflict;
    8 integrity; 9 forgetting; 130 and 143 interrupted; 1 anything else, which is a defect. Who stops reading the
    result (`| head`) has what was wanted, however much of it was written by then: 0. A pipe that breaks in the middle
    of the work: 141.
    """
    with _collecting_seldom():
        return _run(arguments)


COLLECT_AFTER = (100_000, 20, 20)
"""Container objects made before Python looks for unreachable cycles among them, instead of 700: importing torch and
transformers makes a million that all stay, and going through them again and again was a fifth of their import."""


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _run(arguments: Sequence[str] | None) -> int:
    _open_streams()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    flags = given[: given.index("--")] if "--" in given else given
    # Idle OpenMP threads that spin take the cores from whoever else works on the machine; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with StopSignals().installed():
            code = typer.main.get_command(app).main(given, prog_name="graftwerk", standalone_mode=False)
            with read():
                sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ReaderGone:
        _drop_stdout()
        return 0
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt, RunInterrupted) as error:
        fault = as_fault(error)
        if isinstance(error, OSError) and error.filename is None and not _writable():
            _drop_stdout()  # the result cannot be written, nor what Python holds back of it
        if "--debug" in flags:
            print(clean("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        _say(fault, as_json="--json" in flags)
        return fault.exit_code


def as_fault(error: BaseException) -> ErrorReport:
    """Return any error as one of graftwerk's."""
    if isinstance(error, ErrorReport):
        return error
    if isinstance(error, KeyboardInterrupt):
        return RunInterrupted(signal.SIGINT, "stopped by Ctrl-C")
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        name = context.command_path if context is not None else "graftwerk"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return ConfigError(message, hint=f"`{name} --help` shows what there is")
    if _out_of_memory(error):
        return ResourceError(
            "there is not enough memory",
            hint="a smaller training.per_device_train_batch_size with more training.gradient_accumulation_steps, "
            "or training.gradient_checkpointing=true",
        )
    where = str(error.filename) if isinstance(error, OSError) and error.filename else None
    if isinstance(error, OSError) and error.errno in _NAMES_AT_FAULT:
        return ConfigError(f"{error.strerror}: {(where or '')[:200]!r}", hint="choose another name")
    if isinstance(error, OSError) and error.errno is not None:  # no library of ours: the system itself refused
        return ResourceError(f"{error.strerror or error}", where=where)
    text = " ".join(str(error).split())
    return GraftwerkError(
        f"{type(error).__name__}: {text}" if text else type(error).__name__,
        hint="this is a defect of graftwerk or of a library under it; run again with --debug for the traceback",
    )


def _out_of_memory(error: BaseException) -> bool:
    """Return True if an error means out of memory, in Python or in torch; torch is not imported for the test."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from graftwerk.devices import is_out_of_memory

    return is_out_of_memory(error)


def _writable() -> bool:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def _say(fault: ErrorReport, *, as_json: bool) -> None:
    try:
        print(f"graftwerk: {fault}", file=sys.stderr, flush=True)
        if as_json:
            print(dump(fault.as_dict()), flush=True)
    except (OSError, ValueError):  # there is nowhere to say it
        _drop_stdout()


def _open_streams() -> None:
    """Open the null device for each standard stream that was closed before the start (`>&-`).

    Otherwise the next file that is opened would have the stream's number, and whatever is printed would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _drop_stdout() -> None:
    """Detach standard output, which nobody reads any more: flushing it at the exit must not raise again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            continue
