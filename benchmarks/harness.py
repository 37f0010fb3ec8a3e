"""What every benchmark is made of: sides that are run in turn, rows that say what came out, and one command line.

A benchmark measures ratios: both sides in one sitting on one machine, interleaved (A B A B ...), so that what the
machine does meanwhile falls on both alike. `interleaved` does it within a process, `fresh` with a process each time.
See README.md in this folder for a whole example.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What tells processors apart that a virtual machine calls by one name."""


WAIT: ContextVar[Callable[[], object]] = ContextVar("WAIT", default=lambda: None)
"""Waits for the device on which sides compute; `material.on` sets it."""


class WrongResultError(Exception):
    """The sides do not compute the same: a benchmark ends with exit code 1, whatever the times."""


@dataclass(frozen=True)
class Timed:
    """One side's runs, in seconds, in the order in which they were made; ``peak_rss`` in bytes, of fresh processes."""

    times: tuple[float, ...]
    peak_rss: tuple[int, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def worst(self) -> float:
        return max(self.times)

    @property
    def best(self) -> float:
        return min(self.times)

    def as_dict(self) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "median": self.median,
            "worst": self.worst,
            "times": [round(each, 6) for each in self.times],
        }
        if self.peak_rss:
            figures["peak_rss"] = list(self.peak_rss)
        return figures


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        goal: ``P2`` and so on.
        what: Which case, in words; unique within the goal.
        ours, peer: Results in ``unit`` (medians, where they are times).
        ratio: As the goal is worded: ours over peer, or peer over ours ("times faster").
        target: The goal in words: ``at most 1.05``.
        reached: Whether ``ratio`` (or ``ours``) meets it; the worst repeat does not count, but is shown.
        worst: ``{"ours": ..., "peer": ...}``; every single time belongs into ``settings["times"]``.
        settings: What each side was given, so that a reader can judge whether the peer had its best fair settings.
        note: What is extrapolated, or was not run.
    """

    goal: str
    what: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    target: str
    reached: bool
    worst: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What the command line of every benchmark says.

    Attributes:
        quick: Small: only look whether the results are right; the times are printed and not kept.
        repeats: Runs of each side.
    """

    quick: bool
    repeats: int
    extra: argparse.Namespace


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, Timed]:
    """Run each side in turn, ``warmup + repeats`` times, in this process.

    Args:
        sides: What to time. Inside `material.on` the device is waited for before and after each.
        warmup: Rounds before the timed ones.
        before: Called before every single run, outside the clock (to zero gradients, for instance).
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    wait = WAIT.get()
    for round_ in range(warmup + repeats):
        for name, side in sides.items():
            if before is not None:
                before()
            gc.collect()
            wait()
            gc.disable()  # a collection in the middle would fall on whoever happens to be running
            try:
                start = time.perf_counter()
                kept = side()
                wait()
                seconds = time.perf_counter() - start
            finally:
                gc.enable()
            del kept
            if round_ >= warmup:
                times[name].append(seconds)
    return {name: Timed(tuple(values)) for name, values in times.items()}


# A process that was forked from a large one counts that one's memory as its own peak, even after exec: hence a small
# one in between, which starts the command and measures it. Its own start is outside the clock.
_LAUNCHER = """
import json, os, sys, time
out, errors, report, *command = sys.argv[1:]
start = time.perf_counter()
pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
with open(report, "w") as file:
    json.dump([seconds, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)], file)
"""


@dataclass(frozen=True)
class Ended:
    """A fresh process that has ended: wall seconds, peak resident bytes, what it wrote."""

    seconds: float
    peak_rss: int
    code: int
    stdout: str
    stderr: str

    def result(self) -> Any:
        """The JSON object of its last line."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def spawn(command: Sequence[str], env: Mapping[str, str] | None = None) -> Ended:
    """Run a command in a process of its own, and measure it (Linux: `wait4`).

    Raises:
        WrongResultError: it ended with another exit code than 0; the end of what it said is shown.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = [str(folder / each) for each in ("stdout", "stderr", "report")]
        subprocess.run(
            [sys.executable, "-S", "-c", _LAUNCHER, *places, *command],
            env={**os.environ, **(env or {})},
            cwd=ROOT,
            check=True,
        )
        seconds, peak, code = json.loads((folder / "report").read_text())
        out, err = (Path(place).read_text("utf-8", "replace") for place in places[:2])
    if code != 0:
        raise WrongResultError(f"{' '.join(command)} ended with {code}: {err[-2000:]}")
    return Ended(seconds, peak, code, out, err)


def fresh(
    sides: Mapping[str, Sequence[str]],
    repeats: int = 5,
    warmup: int = 0,
    env: Mapping[str, Mapping[str, str]] | None = None,
    check: Callable[[str, Ended], object] | None = None,
) -> dict[str, Timed]:
    """Run each side in turn as a process of its own: wall seconds from its start to its end, and its peak memory.

    Args:
        env: What is added to the environment, by side.
        check: Given a side's name and what it wrote, after every run, outside the clock.

    Raises:
        WrongResultError: a process failed.
    """
    ended: dict[str, list[Ended]] = {name: [] for name in sides}
    for round_ in range(warmup + repeats):
        for name, command in sides.items():
            end = spawn(command, (env or {}).get(name))
            if check is not None:
                check(name, end)
            if round_ >= warmup:
                ended[name].append(end)
    return {
        name: Timed(tuple(end.seconds for end in ends), tuple(end.peak_rss for end in ends))
        for name, ends in ended.items()
    }


def expect(right: bool, what: str) -> None:
    """
    Raises:
        WrongResultError: it is not right.
    """
    if not right:
        raise WrongResultError(what)


def machine() -> dict[str, Any]:
    """What the results depend on besides the code."""
    found: dict[str, Any] = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in _cpuinfo("flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["threads"] = int(os.environ.get("OMP_NUM_THREADS") or found["cores"])
    return found


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor; empty where it says nothing."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def _commit() -> str | None:
    """The commit, and whether the code that was measured or measures differs from it."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    code = ("src", "benchmarks/*.py")
    changed = subprocess.run(["git", "status", "--porcelain", *code], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if asked.returncode == 0 else None


def write(
    goal: str, rows: Sequence[Row], *, quick: bool = False, keep: bool = False, folder: Path | None = None
) -> None:
    """Put the rows into ``results/<goal>.json``, with the machine, the date and the commit beside them.

    Args:
        quick: Nothing is written: quick measurements are no results.
        keep: Rows of an earlier sitting on this machine with the same versions stay, but for those measured anew.
        folder: Where results go; None for `RESULTS`, as it is when this is called.
    """
    if quick:
        return
    folder = folder or RESULTS
    here = machine()
    when = {"date": datetime.now(UTC).date().isoformat(), "commit": _commit()}
    new = [{**asdict(row), **when} for row in rows]
    file = folder / f"{goal}.json"
    if keep and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        measured = {row.what for row in rows}
        if before["machine"] == here:
            new = [row for row in before["rows"] if row["what"] not in measured] + new
    folder.mkdir(exist_ok=True)
    file.write_text(json.dumps({"goal": goal, "machine": here, "rows": new}, indent=1) + "\n", encoding="utf-8")


def main(
    goal: str,
    measure: Callable[[Options], Sequence[Row]],
    arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    *,
    keep: bool = False,
) -> int:
    """The command line of a benchmark; gives its exit code.

    Args:
        measure: Runs it and gives the rows; raises `WrongResultError` where the sides do not agree.
        arguments: Adds arguments of its own; they come back in `Options.extra`.
        keep: As for `write`, for a benchmark that is run in pieces.
    """
    described = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, and fails only on wrong results")
    parser.add_argument("--repeats", type=int, default=None, help="runs of each side (5; quick: 1)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows there too")
    if arguments is not None:
        arguments(parser)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    repeats = given.repeats or (1 if given.quick else 5)
    try:
        rows = list(measure(Options(given.quick, repeats, given)))
    except WrongResultError as error:
        print(f"{goal}: WRONG: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(line(asdict(row)), flush=True)
    write(goal, rows, quick=given.quick, keep=keep)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


def line(row: Mapping[str, Any]) -> str:
    """A row for a terminal."""
    peer = "" if row["peer"] is None else f", peer {row['peer']:.4g}"
    ratio = "" if row["ratio"] is None else f": {row['ratio']:.3g}"
    said = "reached" if row["reached"] else "NOT reached"
    return f"{row['goal']} {row['what']}: ours {row['ours']:.4g} {row['unit']}{peer}{ratio} ({row['target']}: {said})"
