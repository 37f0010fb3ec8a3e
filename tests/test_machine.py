"""How the process of the command line is started, and what that does to its memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from graftwerk import machine
from graftwerk.training.planning.allocator import Series, held_by_libc

SRC = Path(__file__).parents[1] / "src"
STARTS = """
import os
with open(os.environ["STARTS"], "a") as file:
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), file=file)
"""
SCRIPT = "import sys\nsys.argv[1:] = ['plan', '--help']\nfrom graftwerk.__main__ import main\nmain()\n"
COMMAND = ["-m", "graftwerk", "plan", "--help"]
glibc = pytest.mark.skipif(machine._glibc() < (2, 31), reason="another C library")


@glibc
@pytest.mark.parametrize(
    ("arguments", "environment", "starts"),
    [
        (COMMAND, {}, [None, machine.COMPACT]),
        ([str(Path(sys.executable).with_name("graftwerk")), "plan", "--help"], {}, [None, machine.COMPACT]),
        (COMMAND, {machine.TUNABLES: ""}, [""]),
        (COMMAND, {machine.TUNABLES: "glibc.malloc.arena_max=1"}, ["glibc.malloc.arena_max=1"]),
        (COMMAND, {machine._RESTARTED: "1"}, [None]),  # whatever removes the variable on the way, it is tried once
        (["-m", "graftwerk", "--version"], {}, [None]),
        (["-"], {}, [None]),  # another program, whose text is gone once it is read
    ],
    ids=["module", "script", "empty", "own", "restarted", "version", "caller"],
)
def test_command_line_restarts_once_and_only_itself(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], starts: list[str | None]
) -> None:
    if arguments[0].endswith("graftwerk") and not Path(arguments[0]).exists():
        pytest.skip("graftwerk is not installed here")
    (tmp_path / "sitecustomize.py").write_text(STARTS)
    kept = {name: value for name, value in os.environ.items() if name not in (machine.TUNABLES, machine._RESTARTED)}
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SRC}", "STARTS": str(tmp_path / "starts")}
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**kept, **paths, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    said, complaint = process.communicate(SCRIPT, timeout=60)
    assert process.returncode == 0, complaint
    assert said
    assert (tmp_path / "starts").read_text().splitlines() == [f"{process.pid} {each}" for each in starts]


@glibc
def test_command_goes_on_where_it_cannot_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no such interpreter")

    monkeypatch.delenv(machine.TUNABLES, raising=False)
    monkeypatch.delenv(machine._RESTARTED, raising=False)
    monkeypatch.setattr(machine, "_is_command_line", lambda: True)
    monkeypatch.setattr(os, "execve", fail)
    machine.restart_compact()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


@glibc
def test_compact_heap_reuses_the_gaps_of_freed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers that keep some of their tensors, as for backward, and a backward pass that frees them.
    draw, events, recent, count = random.Random(0), array("q"), list[int](), 0
    for _ in range(4):
        kept = []
        for size in (1_500_000, 1_500_000, 3_000_000, 1_500_000) * 20:
            events.append(size)
            count += 1
            (kept if draw.random() < 0.5 else recent).append(count)
            while len(recent) > 2:
                events.append(-recent.pop(0))
        for number in reversed(kept):
            count += 1
            events.extend((1_500_000, -number, -count))
    series, held = Series(events, bytes([1]) * count, ()), []
    for tunables in ("", machine.COMPACT):
        monkeypatch.setenv(machine.TUNABLES, tunables)
        held.append(held_by_libc(series))
    assert held[0] is not None
    assert held[1] is not None
    assert held[1] < 0.8 * held[0]
