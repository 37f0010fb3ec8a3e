"""Available memory, running processes and installed packages of the machine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
"""Environment variable that sets parameters of glibc's allocator, read as a process starts."""
COMPACT = (
    "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    ":glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1099511627776"
)
"""No caches of small blocks, which would put them into the gaps that freed tensors leave; and what a step frees is
kept for the next one (docs/decisions/0025)."""
_RESTARTED = "GRAFTWERK_RESTARTED"


def available() -> int | None:
    """Return the bytes available without swapping, or None if the machine does not say.

    It is the smaller one of the machine's and the control group's.
    """
    free = kilobytes("/proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    group = _group_available(Path("/sys/fs/cgroup"))
    return free * 1024 if group is None else min(free * 1024, group)


def _group_available(group: Path) -> int | None:
    """Return the bytes that a control group (version 2) has left, or None if it has no limit.

    Cached file pages that the kernel can drop count as available.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        held = int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - held + int(files.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def kilobytes(path: str, field: str) -> int | None:
    """Return the number, in kB, of a field in a file of /proc, or None if there is none."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None


def is_running(pid: int) -> bool:
    """Return True if a process exists on this machine, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def start_ticks(pid: int | str = "self") -> int | None:
    """Return the clock ticks after boot at which a process started.

    Args:
        pid: Process id, or "self".

    Returns:
        Field 22 of /proc/<pid>/stat; None if there is no such process, or no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def process_start(pid: int | str = "self") -> float:
    """Return the value that `time.monotonic()` had when a process started; on systems without /proc that of now."""
    now, ticks = time.monotonic(), start_ticks(pid)
    if ticks is None:
        return now
    return now - max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and not needed to start

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def give_back() -> None:
    """Give freed memory back to the system, if the C library has a call for it."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def compact_malloc() -> dict[str, str]:
    """Return the environment variable that makes a new process use less memory and time for its tensors.

    Empty if the C library is not glibc 2.31 or newer, which supports all of its settings, or if the variable is already
    set, even to an empty string.
    """
    if TUNABLES in os.environ or _glibc() < (2, 31):
        return {}
    return {TUNABLES: COMPACT}


def restart_compact() -> None:
    """Re-execute the command line, with its process id and arguments, under the environment of `compact_malloc`.

    Do nothing if that is empty, if this process is another program that calls the command line, or under a debugger.
    SIGINT and SIGTERM stay blocked until the new process reaches this function, with its handlers in place.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    if os.environ.pop(_RESTARTED, None) is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    if not _is_command_line() or not (changed := compact_malloc()):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with contextlib.suppress(OSError, ValueError):  # then the command runs as it is
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **changed, _RESTARTED: "1"})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _is_command_line() -> bool:
    """Return True if this process is `python -m graftwerk` or the console script, and is not being traced."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    ours = spec.parent == __package__ if spec is not None else os.path.basename(path or "") == "graftwerk"
    return ours and bool(sys.executable) and len(sys.orig_argv) > 1 and sys.gettrace() is None


def _glibc() -> tuple[int, ...]:
    """Return the version of glibc, or (0,) if the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (0,)
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return (0,)
