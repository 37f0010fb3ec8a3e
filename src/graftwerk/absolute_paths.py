"""Absolute paths in a run file, so that a run folder can be used from any working directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from glob import escape, glob
from pathlib import Path
from typing import Any

SOURCE_KEYS = ("source", "target", "validation", "test")
"""Keys of a data set, or of two aligned files, that hold sources of rows."""
PATH_KEYS = ("model", "base", "path")
"""Keys of an augmenter that hold a model or a file."""
RETAINED_KEYS = ("run", "data", "texts")
"""Keys of what must not be forgotten that hold a folder or a file."""


def with_absolute_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a run file with every relative path to an existing file or folder made absolute.

    Hub ids, files of packages and paths that do not exist stay as they are, and so does `output_dir`.
    """
    tree = dict(tree)
    for key in ("model", "data", "training", "evaluation"):
        if tree.get(key) is not None:
            tree[key] = _absolute(tree[key]) if key == "model" else dict(tree[key])
    data, training = tree.get("data") or {}, tree.get("training") or {}
    for key in ("train", "validation", "test"):
        if key in data:
            data[key] = _absolute_source(data[key])
    if data.get("augment"):
        data["augment"] = [_absolute_augmenter(each) for each in data["augment"]]
    if training.get("warm_start") is not None:
        training["warm_start"] = _absolute(training["warm_start"])
    if retained := (tree.get("evaluation") or {}).get("retained"):
        tree["evaluation"]["retained"] = {name: _absolute_retained(each) for name, each in retained.items()}
    return tree


def _absolute_retained(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    general = entry.get("texts") == "general"
    return {
        key: _absolute(value) if key in RETAINED_KEYS and not (key == "texts" and general) else value
        for key, value in entry.items()
    }


def _absolute_source(source: Any) -> Any:
    """Resolve a file, several, two aligned ones, or data sets with their own sources; not numbers of rows."""
    if isinstance(source, list | tuple):
        return [_absolute_source(each) for each in source]
    if isinstance(source, Mapping):
        return {key: _absolute_source(value) if key in SOURCE_KEYS else value for key, value in source.items()}
    return _absolute(source)


def _absolute_augmenter(augmenter: Any) -> Any:
    if not isinstance(augmenter, Mapping):
        return augmenter
    changed = {key: _absolute(value) if key in PATH_KEYS else value for key, value in augmenter.items()}
    return {**changed, **({"through": _absolute_augmenter(changed["through"])} if "through" in changed else {})}


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path.strip() or "\0" in path or "://" in path:
        return path
    resolved = Path(path).expanduser()
    try:
        if resolved.exists():
            return str(resolved.absolute())
        if any(mark in path for mark in "*?[") and not resolved.is_absolute() and glob(str(resolved), recursive=True):
            return os.path.join(escape(str(Path.cwd())), str(resolved))
    except OSError:  # longer than the file system takes: reported when it is opened
        return path
    return path
