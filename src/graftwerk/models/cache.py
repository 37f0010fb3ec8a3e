"""The folder for what is costly to make and can be made again: converted models, hardware probes, checked hashes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the cache folder, which need not exist yet.

    It is `$GRAFTWERK_CACHE`, else `$XDG_CACHE_HOME/graftwerk`, else `~/.cache/graftwerk`.
    """
    if own := os.environ.get("GRAFTWERK_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "graftwerk"


def recall(name: str, key: str) -> Any:
    """Return the value that `remember` stored under a key, or None if there is none or the file is damaged."""
    try:
        kept = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get(key) if isinstance(kept, dict) else None


def remember(name: str, key: str, value: Any) -> None:
    """Keep a JSON value for later processes; where the folder cannot be written, only this process knows it."""
    path = cache_folder() / f"{name}.json"
    with contextlib.suppress(OSError):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        kept = {**kept, key: value} if isinstance(kept, dict) else {key: value}
        replace_file(path, json.dumps(kept).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of the cache whole: a reader finds the old content or the new one.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def make_room(folder: Path, limit: int, *, needed: int = 0, pattern: str = "*") -> None:
    """Delete the files that were used longest ago until ``needed`` more bytes stay within the limit.

    A process that has one of them open or mapped keeps it until it ends.

    Args:
        folder: A folder of the cache.
        limit: Most bytes of all its files.
        needed: Bytes of the next file.
        pattern: Names of the files that count; ``*`` includes what killed writers left.
    """
    files = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            facts = path.stat()
            files.append((facts.st_mtime_ns, path, facts.st_size))
    total = sum(size for _, _, size in files)
    for _, path, size in sorted(files):
        if total + needed <= limit:
            return
        total -= size
        path.unlink(missing_ok=True)
