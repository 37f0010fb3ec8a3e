"""The most memory that a piece of work held at any moment.

On a CUDA device torch counts what it allocates, exactly. In the machine's own memory the resident set is what counts,
and the Linux kernel keeps its high-water mark itself (`VmHWM`) and lets a process set it back
(`/proc/self/clear_refs`), so that no peak is missed and nothing has to watch.

Pages of code do not count. A library's pages become resident when they are first run, so a process forked from a warm
one would seem to need more than a fresh one for the same training: 539 MB against 526 MB for four steps of MiniLM
here. With code left out at both ends it is 498 MB and 502 MB.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

SAMPLE_SECONDS = 0.01
SELF = Path("/proc/self")


class Peak:
    """Result of `peak_memory`.

    Attributes:
        bytes: The peak, or None inside the block or if the system does not say.
        how: How it was measured.
    """

    bytes: int | None = None
    how: str = ""


def resident(device: torch.device | str | None = None) -> int | None:
    """Return the bytes in use now, as a baseline for `peak_memory(above=...)`, or None if the system does not say."""
    if _kind(device) == "cuda":
        return int(torch.cuda.memory_allocated())
    held = _resident_set()
    return None if held is None else held - _code()


@contextmanager
def peak_memory(above: int | None = None, device: torch.device | str | None = None) -> Iterator[Peak]:
    """Measure the peak of the block above a baseline.

    Args:
        above: An earlier `resident()`, for instance from before the model was loaded, or None for the bytes in use
            when the block begins.
        device: Device whose memory is measured, or None for the CUDA device if there is one, else the machine.
    """
    peak = Peak()
    baseline = resident(device) if above is None else above
    meter = _meter(device)
    meter.start()
    try:
        yield peak
    finally:
        highest = meter.stop()
        peak.how = meter.how
        if highest is not None and baseline is not None:
            peak.bytes = max(highest - baseline, 0)


def _kind(device: torch.device | str | None) -> str:
    return torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"


class _Meter:
    how = "ru_maxrss"

    def start(self) -> None:
        return

    def stop(self) -> int | None:
        return _highest_so_far()


class _Cuda(_Meter):
    how = "torch.cuda.max_memory_allocated"

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> int | None:
        return int(torch.cuda.max_memory_allocated())


class _HighWater(_Meter):
    """The kernel's mark. Blocks may be nested: whoever sets the mark back first tells all open ones how high it was."""

    how = "high-water mark of the resident set"
    _open: ClassVar[list[_HighWater]] = []

    def start(self) -> None:
        self.tell()
        self._highest = 0
        _set_mark_back()
        self._open.append(self)

    def stop(self) -> int | None:
        self.tell()
        self._open.remove(self)
        return self._highest - _code()

    @classmethod
    def tell(cls) -> None:
        mark = _status("VmHWM") or 0
        for meter in cls._open:
            meter._highest = max(meter._highest, mark)


class _Sampler(_Meter):
    """Looks again and again; peaks shorter than its interval may be missed."""

    how = f"resident set, looked at every {1000 * SAMPLE_SECONDS:.0f} ms"

    def start(self) -> None:
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._look()
        self._thread.start()

    def stop(self) -> int | None:
        self._done.set()
        self._thread.join()
        self._look()
        return self._highest - _code() if self._highest else None

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self._highest = max(self._highest, _resident_set() or 0)


def _meter(device: torch.device | str | None) -> _Meter:
    if _kind(device) == "cuda":
        return _Cuda()
    if sys.platform != "linux":
        return _Meter()
    _HighWater.tell()  # before the mark is set back for the first time
    return _HighWater() if _set_mark_back() else _Sampler()


def _set_mark_back() -> bool:
    """Sets the high-water mark to what is resident now; False where that is not allowed."""
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        for line in (SELF / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _resident_set() -> int | None:
    """Return the resident set of this process in bytes, or None if the system does not tell.

    On systems without /proc it is the highest so far: in a process of its own, as a comparison's runs have, that serves
    as well.
    """
    try:
        return int((SELF / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _highest_so_far()


def _highest_so_far() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _code() -> int:
    """Resident bytes of files that have any executable mapping: the program and its libraries."""
    held: dict[str, int] = {}
    executable: set[str] = set()
    path = ""
    try:
        with (SELF / "smaps").open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line[0] in "0123456789abcdef":  # a mapping; its sizes follow, and they begin with capitals
                    fields = line.split(maxsplit=5)
                    path = fields[5].rstrip("\n") if len(fields) > 5 else ""
                    if "x" in fields[1]:
                        executable.add(path)
                elif line.startswith("Rss:"):
                    held[path] = held.get(path, 0) + int(line.split()[1]) * 1024
    except OSError:
        return 0
    return sum(size for name, size in held.items() if name in executable and name.startswith("/"))
