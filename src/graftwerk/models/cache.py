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
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        kept = {**kept, key: value} if isinstance(kept, dict) else {key: value}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
