"""How the process of the command line is started, and what that does to its memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from graftwerk import machine
from graftwerk.training.planning.allocator import Series, held_by_libc

SRC = Path(__file__).parents[1] / "src"
ENTRY = """
import os, sys
import graftwerk.cli.main as command_line
command_line.main = lambda: print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), *sys.argv[1:])
from graftwerk.__main__ import main
main()
"""
glibc = pytest.mark.skipif(not machine._has_glibc(), reason="another C library")


@glibc
@pytest.mark.parametrize("said", [None, "", "glibc.malloc.arena_max=1"])
def test_command_line_restarts_once_with_a_compact_heap_unless_the_variable_is_set(said: str | None) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (machine.TUNABLES, machine._RESTARTED)}
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, "train", "a b"],
        env={**kept, "PYTHONPATH": str(SRC), **({} if said is None else {machine.TUNABLES: said})},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = process.communicate(timeout=60)[0]
    assert found == f"{machine.COMPACT if said is None else said} {process.pid} train a b\n"


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
