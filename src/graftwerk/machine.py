"""How much memory the machine has left."""

from __future__ import annotations

from pathlib import Path


def available() -> int | None:
    """Bytes of memory that can be had without swapping, of the machine and of the control group, the lesser; None where
    the machine does not say.
    """
    free = kilobytes("/proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    group = _group_available(Path("/sys/fs/cgroup"))
    return free * 1024 if group is None else min(free * 1024, group)


def _group_available(group: Path) -> int | None:
    """Bytes that a control group (version 2) has left, files that it can let go not counted; None: no limit."""
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
    """A figure of a file in /proc; None where there is none."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
