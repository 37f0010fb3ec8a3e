"""Work done in a forked child of the test's process, which has everything imported already; and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwerk.errors import ErrorReport


class Child:
    """``function`` in a process of its own; `wait` gives its exit code, that of its error, or minus the
    signal.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            signal.alarm(900)  # one that waits for ever would keep the whole suite waiting
            try:
                function()
                code = 0
            except ErrorReport as error:
                code = error.exit_code
                print(f"child {os.getpid()}: {error}", file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


TIMES = ("seconds", "left_seconds", "path", "cost")


def log_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run's log, without what the clock says; of all kinds, or of these."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if not kinds or line["kind"] in kinds
    ]


def left_by(folder: Path) -> dict[str, bytes]:
    """Every byte that training left: the adapter's weights, and of each checkpoint the weights, moments and
    generators.
    """
    files = [
        folder / "adapter" / "adapter_model.safetensors",
        *sorted((folder / "checkpoints").glob("step-*/*.safetensors")),
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
