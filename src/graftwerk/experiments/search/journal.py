"""The journal file of a study, in a state in which Optuna can read it.

Optuna's `JournalFileBackend` appends one JSON object a line. A process that is killed in the middle of a write leaves
a line without its end, which makes all later reads raise once another line follows; and a lock file that would hold up
the next process for half a minute. Both are mended before the file is opened, by whoever holds the lock of the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from graftwerk.errors import IntegrityError, ResourceError
from graftwerk.own_files import open_own, refuse_link

JOURNAL = "study.journal"
LOCK_ENDINGS = (".lock", ".rename")


def require_optuna() -> Any:
    """Return the package optuna, told to be quiet.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ResourceError("searching needs the package optuna", hint="pip install 'graftwerk[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def cut_torn_end(path: Path) -> int:
    """Cut a torn last line off a journal, and remove the lock that a killed process has left.

    The caller holds the lock of the folder, so that no other process writes.

    Returns:
        The number of bytes that were cut off.

    Raises:
        IntegrityError: A line before the last is damaged, or the file is a link.
    """
    refuse_link(path)
    for lock in path.parent.glob(f"{path.name}{LOCK_ENDINGS[0]}*"):
        lock.unlink(missing_ok=True)
    if not path.is_file():
        return 0
    content = path.read_bytes()
    lines = content.split(b"\n")
    torn = len(lines.pop())
    if not torn and lines and not _readable(lines[-1]):  # zeros of a disk that lost power, or half of two lines
        torn = len(lines.pop()) + 1
    for place, line in enumerate(lines, start=1):
        if not _readable(line):
            raise IntegrityError(
                f"line {place} of {path.name} is damaged, and others follow it",
                where=f"{path}:{place}",
                hint="search again in another output_dir, or with --overwrite",
            )
    if torn:
        with os.fdopen(open_own(path, os.O_RDWR), "rb+") as stream:
            stream.truncate(len(content) - torn)
            os.fsync(stream.fileno())
    return torn


def _readable(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
