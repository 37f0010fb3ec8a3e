"""Disk cache of rows that were read, split, checked and encoded, for the next start of the same run file.

An entry is plain JSON in the cache folder (``prepared/<key>.json``), after its own SHA-256. The key is a hash of all
that the result depends on: the bytes of every source file, the settings, the tokenizer's files, the versions of the
packages, and size and time of the source files that read and encode. Any change gives another key, so no entry is ever
stale. A damaged file counts as missing, and a failure to write is ignored. Values that JSON does not restore exactly
(dates of a parquet file, say), streamed rows and rows of the hub are not cached. Only results are cached, never errors;
checks of encoded rows run anew each time.

The folder is readable by its owner only, since it holds text of the rows, and holds at most `MOST_BYTES`: entries
unused for the longest time are deleted first. ``GRAFTWERK_PLAIN=prepared`` disables the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.data.findings import Issue
from graftwerk.data.settings import DataSettings, Source
from graftwerk.data.sources import files_of
from graftwerk.errors import GraftwerkError
from graftwerk.kernels import flags
from graftwerk.models.cache import cache_folder, make_room, replace_file
from graftwerk.tasks.base import Example, Row, Splits, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BYTES_EACH = 64 << 20
"""Larger data is read again: parsing so much JSON would gain little."""
MOST_BYTES = 512 << 20
SPLITS = ("train", "validation", "test")
PACKAGES = ("transformers", "tokenizers", "sentencepiece", "pyarrow")
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot")
"""Files of a model's folder that no token depends on."""


def read(task: Task, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
    """Read the rows through the cache, as ``task.read(data, labels)``, errors included.

    Rows that are cached have their key in `Splits.cache_key`.
    """
    key = _rows_key(task, data, labels)
    if key is None:
        return task.read(data, labels)
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        if (kept := _recall(key)) is not None:
            return _splits(kept, key)
    splits = task.read(data, labels)
    # The files may have been written to in between: then it is not known what was read.
    if _rows_key(task, data, labels) == key and _keep(key, _plain_splits(splits)):
        return replace(splits, cache_key=key)
    return splits


def encode(
    task: Task, splits: Splits, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path
) -> list[Example]:
    """Encode a split through the cache, as ``task.encode(getattr(splits, split), ...)``.

    Args:
        task: The task.
        splits: The splits.
        split: Name of the split: `train`, `validation` or `test`.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of a row.
        folder: Folder that the tokenizer and the model's configuration were read from.
    """
    rows: Sequence[Row] = getattr(splits, split)
    key = None
    if splits.cache_key is not None and flags.enabled("prepared"):
        key = _digest(["examples", splits.cache_key, split, task.to_dict(), max_length, _tokenizer_files(folder)])
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
            if (kept := _recall(key)) is not None:
                return [_example(entry, rows) for entry in kept]
    examples = task.encode(rows, tokenizer, splits, max_length)
    if key is not None:
        places = {id(row): at for at, row in enumerate(rows)}
        _keep(key, [_plain_example(example, places) for example in examples])
    return examples


# -- keys --------------------------------------------------------------------------------------------------------------


def _rows_key(task: Task, data: DataSettings, labels: Sequence[str] | None) -> str | None:
    """Return the cache key of the rows, or None if they are not to be cached."""
    if data.streaming or not flags.enabled("prepared"):
        return None
    try:
        named = list(_files(data))
        if None in named:
            return None
        files = [[str(path), _hash(path)] for path in dict.fromkeys(path for path in named if path is not None)]
        settings = data.model_dump(mode="json")
    except (GraftwerkError, OSError, ValueError):  # reading will say what is wrong
        return None
    return _digest(["rows", task.to_dict(), settings, None if labels is None else list(labels), files])


def _files(data: DataSettings) -> Iterator[Path | None]:
    sources: list[Source | int | float | None] = [] if data.sets else [data.source]
    sources += [data.validation, data.test]
    for each in data.sets:
        sources += [each.rows_from, each.validation, each.test]
    for source in sources:
        if source is None or isinstance(source, int | float):
            continue
        found = files_of(source)
        yield from [None] if found is None else found


def _tokenizer_files(folder: Path) -> list[list[str]]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in WEIGHTS)
    return [[file.name, _hash(file)] for file in files]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps([*parts, _code()], sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code() -> list[Any]:
    """Return the identity of the code that reads and encodes: versions of packages, and size and time of our files."""
    versions = [sys.version]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    own = Path(__file__).parents[1]
    files = sorted((*(own / "data").glob("*.py"), *(own / "tasks").glob("*.py"), own / "models" / "load.py"))
    states = [(file.name, file.stat()) for file in files]
    return [versions, [[name, state.st_size, state.st_mtime_ns] for name, state in states]]


# -- values as JSON holds them -----------------------------------------------------------------------------------------


def _plain_splits(splits: Splits) -> dict[str, Any]:
    rows = {split: list(getattr(splits, split)) for split in SPLITS}
    return {
        **rows,
        "labels": None if splits.labels is None else list(splits.labels),
        "fingerprint": splits.fingerprint,
        "findings": [asdict(finding) for finding in splits.issues],
        "origin": splits.origin,
        "where": {split: [where(at) for at in range(len(rows[split]))] for split, where in splits.where.items()},
    }


def _splits(kept: dict[str, Any], key: str) -> Splits:
    return Splits(
        **{split: kept[split] for split in SPLITS},
        labels=None if kept["labels"] is None else tuple(kept["labels"]),
        fingerprint=kept["fingerprint"],
        issues=tuple(Issue(**finding) for finding in kept["findings"]),
        origin=kept["origin"],
        where={split: places.__getitem__ for split, places in kept["where"].items()},
        cache_key=key,
    )


def _plain_example(example: Example, places: dict[int, int]) -> list[Any]:
    # A row of the split is named by its place; one that the task made for itself is kept whole.
    row = None if example.row is None else places.get(id(example.row), example.row)
    return [example.inputs, example.target, example.truncated, example.prompt, row, list(example.notes)]


def _example(entry: list[Any], rows: Sequence[Row]) -> Example:
    inputs, target, truncated, prompt, row, notes = entry
    return Example(inputs, target, truncated, prompt, rows[row] if isinstance(row, int) else row, tuple(notes))


# -- files -------------------------------------------------------------------------------------------------------------


def _recall(key: str) -> Any:
    path = _cache_file(key)
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: the last to be cleaned away
    return json.loads(content)


def _keep(key: str, value: Any) -> bool:
    """Write a value to the cache, and return True if that succeeded."""
    try:
        content = json.dumps(value, separators=(",", ":")).encode()
        if len(content) > MOST_BYTES_EACH or json.loads(content) != value:
            return False
    except (TypeError, ValueError, RecursionError):
        return False
    path = _cache_file(key)
    try:
        replace_file(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        make_room(path.parent, MOST_BYTES)
    except OSError:
        return False
    return True


def _cache_file(key: str) -> Path:
    return cache_folder() / "prepared" / f"{key}.json"
