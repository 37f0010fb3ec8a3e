"""Reading the plain files of a run or a comparison, and writing the page whole or not at all.

The files may be old, incomplete or written by another program: `at` and similar functions return None, or an empty
value, if a value is not of the expected kind, and the page then says that it is missing. Only a file that cannot be
read at all is an error.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, IntegrityError, ResourceError
from graftwerk.own_files import refuse_link

COMPARISON, SEARCH, SEQUENCE, MANIFEST, CONFIG, LOG, REPORT = (
    "comparison.json", "search.json", "sequence.json", "manifest.json", "config.yaml", "metrics.jsonl", "report.html",
)  # fmt: skip

LARGEST = 1e30
"""No value of a run is larger, nor, unless it is zero, as small as one by this; so that a scale cannot overflow."""


def at(tree: Any, *keys: str) -> Any:
    """Return the value at a path of keys, or None if there is none."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def mapping(tree: Any, *keys: str) -> Mapping[str, Any]:
    """Return the mapping at a path of keys, or an empty one if there is none."""
    found = at(tree, *keys)
    return found if isinstance(found, Mapping) else {}


def items(tree: Any, *keys: str) -> list[Any]:
    """Return the list at a path of keys, or an empty one if there is none."""
    found = at(tree, *keys)
    return list(found) if isinstance(found, list) else []


def mappings(tree: Any, *keys: str) -> list[Mapping[str, Any]]:
    """Return the mappings in a list."""
    return [item for item in items(tree, *keys) if isinstance(item, Mapping)]


def number(tree: Any, *keys: str) -> float | None:
    """Return a finite number, or None; a log has ``"nan"`` for a loss that was not a number."""
    found = at(tree, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        value = float(found)
    except OverflowError:
        return None
    if not math.isfinite(value) or abs(value) > LARGEST:
        return None
    return 0.0 if abs(value) < 1 / LARGEST else value


def words(tree: Any, *keys: str) -> str:
    """Return a text, a number, or a list of them as text; "" if there is none."""
    found = at(tree, *keys)
    if isinstance(found, list):
        return ", ".join(words(item) for item in found)
    if found is None or isinstance(found, Mapping):
        return ""
    return str(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        IntegrityError: It does not hold one.
        ResourceError: It cannot be read.
    """
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise IntegrityError(f"{path.name} holds no JSON object", where=str(path))
    return found


def read_text(path: Path) -> str:
    """Read a file as UTF-8, with invalid bytes replaced.

    Raises:
        ResourceError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}", where=str(path)) from None


def hint_of(entry: Any) -> str:
    """Return an entry's hint; files of 0.1.0 call it `mend`."""
    return words(entry, "hint") or words(entry, "mend")


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the events of a run in order; return them and the number of invalid lines (a truncated last one, mostly)."""
    events: list[dict[str, Any]] = []
    broken = 0
    if not path.is_file():
        return events, broken
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            events.append(event)
        else:
            broken += 1
    return events, broken


def write_page(folder: Path, content: str, name: str = REPORT) -> Path:
    """Write the page beside its destination, force it to the disk, and rename it.

    Raises:
        ResourceError: the folder cannot be written; an earlier page is untouched.
        ConfigError: something that is no file has the page's name.
        IntegrityError: a link has it.
    """
    refuse_link(folder / name)
    target = folder / name
    partial = folder / f".{name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    if target.is_dir():
        raise ConfigError(f"{target} is a folder, and a file is to be written there", where=str(target))
    try:
        with open(partial, "xb") as stream:
            stream.write(content.encode("utf-8", errors="replace"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise ResourceError(
            f"cannot write {target}: {error.strerror}; {len(content):,} bytes are needed",
            where=str(target),
            hint="free space, or change the folder's permissions",
            recovered=f"{target} as it was before" if target.exists() else None,
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target
