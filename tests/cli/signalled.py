"""Commands that get a signal at a chosen call of a Python function, each in a fork of a process with all imported.

    python signalled.py '[{"arguments": [...], "share": 0.4, "signum": 2}, ...]'

prints a JSON object a line: what was asked, the calls counted, the exit code (minus the signal where one killed the
process), and the end of stderr. ``share`` is of the calls that the whole command takes; None: no signal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any


def attempt(arguments: list[str], at: int | None, signum: int) -> tuple[int, int, str]:
    """Run a command that is sent a signal at its call number ``at``; gives calls, exit code, stderr."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as counted:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.alarm(120)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            os._exit(_run(arguments, at, signum, counted.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        counted.seek(0)
        return int(counted.read() or 0), code, said.read().decode(errors="replace")


def _run(arguments: list[str], at: int | None, signum: int, counted: int) -> int:
    from graftwerk.cli.main import main

    calls, me = 0, os.getpid()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at and os.getpid() == me:
            os.kill(me, signum)

    sys.setprofile(count)
    code = main(arguments)
    sys.setprofile(None)
    os.pwrite(counted, str(calls).encode(), 0)
    sys.stderr.flush()
    return code


def main() -> None:
    from graftwerk.experiments.fork_server import _import_everything

    _import_everything()
    whole: dict[str, int] = {}
    for trial in json.loads(sys.argv[1]):
        key = json.dumps(trial["arguments"])
        fresh = [Path(folder) for folder in trial.get("fresh", ())]
        if key not in whole:
            _remove(fresh)
            whole[key], code, said = attempt(trial["arguments"], None, 0)
            assert code == 0, said
        _remove(fresh)
        at = max(1, int(trial["share"] * whole[key]))
        _, code, said = attempt(trial["arguments"], at, trial["signum"])
        print(json.dumps({**trial, "at": at, "of": whole[key], "code": code, "said": said[-1500:]}), flush=True)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
