"""The most memory that a piece of work held at any moment.

On CUDA and XPU devices torch counts what it allocates, exactly; the peaks of all devices of this process are added up.
In the machine's own memory the resident set is what counts, and the Linux kernel keeps its high-water mark itself
(`VmHWM`) and lets a process set it back (`/proc/self/clear_refs`), so that no peak is missed and nothing has to watch.
MPS keeps no mark: a thread looks at what is allocated.

Pages of code do not count. A library's pages become resident when they are first run, so a process forked from a warm
one would seem to need more than a fresh one for the same training: 539 MB against 526 MB for four steps of MiniLM
here. With code left out at both ends it is 498 MB and 502 MB.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from graftwerk.devices import backend, best_device, device_indices
from graftwerk.machine import kilobytes

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
    found = _device(device)
    if (module := backend(found)) is not None:
        if found.type == "mps":
            return int(module.current_allocated_memory())
        return sum(int(module.memory_allocated(index)) for index in device_indices(found))
    held = _resident_set()
    return None if held is None else held - _code()


@contextmanager
def peak_memory(above: int | None = None, device: torch.device | str | None = None) -> Iterator[Peak]:
    """Measure the peak of the block above a baseline.

    Args:
        above: An earlier `resident()`, for instance from before the model was loaded, or None for the bytes in use
            when the block begins.
        device: Device whose memory is measured, or None for the accelerator if there is one, else the machine. The
            number of a device does not count: all of its kind are measured.
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


def _device(device: torch.device | str | None) -> torch.device:
    return best_device() if device is None else torch.device(device)


class _Meter:
    how = "ru_maxrss"

    def start(self) -> None:
        return

    def stop(self) -> int | None:
        return _highest_so_far()


class _Marked(_Meter):
    """High-water marks that can be set back.

    Blocks may be nested: whoever sets the marks back first tells all open ones how high they were.
    """

    _open: ClassVar[list[_Marked]] = []

    def start(self) -> None:
        self.tell()
        self._highest = [0 for _ in self.marks()]
        self.set_back()
        self._open.append(self)

    def stop(self) -> int | None:
        self.tell()
        self._open.remove(self)
        return sum(self._highest)

    def tell(self) -> None:
        marks = self.marks()
        for meter in self._open:
            if meter.how == self.how:
                meter._highest = [max(pair) for pair in zip(meter._highest, marks, strict=True)]

    def marks(self) -> list[int]:
        """Return the bytes at each mark."""
        raise NotImplementedError

    def set_back(self) -> None:
        """Set the marks to what is held now."""
        raise NotImplementedError


class _Device(_Marked):
    def __init__(self, module: Any, indices: range) -> None:
        self.module, self.indices, self.how = module, indices, f"{module.__name__}.max_memory_allocated"

    def marks(self) -> list[int]:
        return [int(self.module.max_memory_allocated(index)) for index in self.indices]

    def set_back(self) -> None:
        for index in self.indices:
            self.module.reset_peak_memory_stats(index)


class _HighWater(_Marked):
    how = "high-water mark of the resident set"

    def stop(self) -> int | None:
        return (super().stop() or 0) - _code()

    def marks(self) -> list[int]:
        return [1024 * (kilobytes(str(SELF / "status"), "VmHWM:") or 0)]

    def set_back(self) -> None:
        _set_mark_back()


class _Sampler(_Meter):
    """Looks again and again; peaks shorter than its interval may be missed."""

    how = f"resident set, looked at every {1000 * SAMPLE_SECONDS:.0f} ms"

    def __init__(self, held: Callable[[], int] | None = None) -> None:
        if held is not None:
            self.how = self.how.replace("resident set", "torch.mps.current_allocated_memory")
        self._held = held or (lambda: _resident_set() or 0)
        self._code: Callable[[], int] = (lambda: 0) if held else _code

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
        return self._highest - self._code() if self._highest else None

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self._highest = max(self._highest, self._held())


def _meter(device: torch.device | str | None) -> _Meter:
    found = _device(device)
    if (module := backend(found)) is not None:
        return (
            _Sampler(module.current_allocated_memory) if found.type == "mps" else _Device(module, device_indices(found))
        )
    if sys.platform != "linux":
        return _Meter()
    _HighWater().tell()  # before the mark is set back for the first time
    return _HighWater() if _set_mark_back() else _Sampler()


def _set_mark_back() -> bool:
    """Set the high-water mark to what is resident now; return False if that is not allowed."""
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


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
    """Return the resident bytes of files with an executable mapping: the program and its libraries."""
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
