"""The one gate through which every foreign file comes in.

Weights come as safetensors and settings as JSON; nothing else is ever read, and a pickle, whatever it calls itself, is
refused without being opened further than its first bytes. A safetensors header is checked here, completely, before any
data is read and before memory is reserved for it: at most `MAX_HEADER_BYTES`, and every tensor's bytes begin exactly
where those before it end, so that neither overlaps, gaps nor overflowing sizes can exist. The data is then read
through the same open file: nobody can exchange it between check and use, and no tensor stays mapped onto a file that
may change later.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from graftwerk.errors import EnvironmentFault, IntegrityError

MAX_HEADER_BYTES = 2**20
"""About 8,000 tensors; a hostile header of this size is still refused within 100 ms."""
MAX_TENSORS = 12_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 12
MAX_JSON_VALUES = 100_000
MAX_ESCAPES = 10_000

PICKLE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".mar"}
)
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
)
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CONVERT = (
    "ask its author for a safetensors file, or convert it where you can afford to run its code "
    "(PEFT: `save_pretrained(folder, safe_serialization=True)`)"
)


_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checked header: ``begin`` and ``end`` count bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(path: Path | str, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in the file's order, on the CPU, each in memory of its own.

    Args:
        path: The file.
        max_bytes: Most bytes of data to accept; the machine's memory by default.

    Raises:
        IntegrityError: it is a pickle or archive in any disguise, damaged, or its header is not exactly right.
        EnvironmentFault: it does not exist or cannot be read.
    """
    path = Path(path)
    with _opened(path) as stream:
        header = _checked_header(stream, path, _memory() if max_bytes is None else max_bytes)
        tensors = {}
        for name, info in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
            tensor = torch.empty(info.shape, dtype=info.dtype)
            if tensor.numel():
                view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
                if _read_into(stream, view) != len(view):
                    _refuse(path, f"it ends within tensor `{name!a}`")
            tensors[name] = tensor
    return tensors


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The checked header of a safetensors file; no data is read. Raises as `read_tensors` does."""
    path = Path(path)
    with _opened(path) as stream:
        return _checked_header(stream, path, None)


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from a foreign file.

    Raises:
        IntegrityError: it is larger than 1 MiB, deeper than 12 levels, no UTF-8, no JSON object, has a key twice, or
            holds too many values or a number that JSON does not know (NaN, Infinity).
        EnvironmentFault: it does not exist or cannot be read.
    """
    path = Path(path)
    with _opened(path) as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        _refuse(path, f"it is larger than {MAX_JSON_BYTES:,} bytes")
    if sum(content.count(sign) for sign in (b"{", b"[", b",")) > MAX_JSON_VALUES:
        _refuse(path, f"it holds more than {MAX_JSON_VALUES:,} values")
    values = _parse_json(content, path)
    if not isinstance(values, dict):
        _refuse(path, "it holds no JSON object")
    _check_depth(values, path)
    return values


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Says why ``wanted`` is not to be had where only a pickle of it lies in a folder. The pickle is not opened.

    Raises:
        IntegrityError: a file of the same stem has a suffix that pickles use.
    """
    stem = Path(wanted).stem
    for entry in sorted(os.listdir(folder)):
        found = Path(entry)
        if found.suffix.lower() in PICKLE_SUFFIXES and found.name.split(".")[0] == stem:
            _refuse(
                folder / entry,
                "it is a pickle, which can run any code when it is loaded, so it was not opened",
                _CONVERT,
            )


def _opened(path: Path) -> io.FileIO:
    """The file, opened unbuffered, if it is regular and neither its name nor its first bytes say pickle or archive."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        _refuse(
            path, "it is a pickle by its name, which can run any code when it is loaded, so it was not opened", _CONVERT
        )
    try:
        # Not blocking, so that a pipe put in the place of a file cannot hold us up.
        stream = io.FileIO(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)))
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read {path}: {error.strerror}", where=str(path), mend="check the path"
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            _refuse(path, "it is no regular file")
        start = os.pread(stream.fileno(), 24, 0)
        for magic, kind in _MAGIC:
            # A header of 640 bytes begins as pickles do (80 02), but only a header has its brace at byte 8.
            if start.startswith(magic) and start[8:9] != b"{":
                _refuse(path, f"its first bytes say that it is {kind}", _CONVERT)
    except BaseException:
        stream.close()
        raise
    return stream


def _checked_header(stream: io.FileIO, path: Path, max_bytes: int | None) -> dict[str, TensorInfo]:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 10 or length < 2:
        _refuse(path, f"with {size:,} bytes it is too short for a safetensors file")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    if length > size - 8:
        _refuse(path, f"its header claims {length:,} bytes, but the file has only {size:,}")
    if max_bytes is not None and size > max_bytes:
        _refuse(path, f"it has {size:,} bytes; at most {max_bytes:,} are read here")
    content = stream.read(length)
    if len(content) != length:
        _refuse(path, "it ends within its header")
    _check_outline(content, path)
    with _no_garbage_collection():
        return _understood(content, path, size - 8 - length)


def _understood(content: bytes, path: Path, data_size: int) -> dict[str, TensorInfo]:
    entries = _parse_header(content, path)
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        _refuse(path, "its `__metadata__` is not a mapping from text to text")
    header = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, header.items(), data_size)
    return header


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Thousands of new objects and no cycles: looking for some among all of torch's takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_outline(content: bytes, path: Path) -> None:
    """Bounds what parsing can cost before it is done: every tensor has one brace, two brackets, few commas."""
    if not content.startswith(b'{"') and content.rstrip() != b"{}":
        _refuse(path, "its header is no JSON object")
    braces, brackets, commas = content.count(b"{"), content.count(b"["), content.count(b",")
    if braces > MAX_TENSORS:
        _refuse(path, f"its header lists more than {MAX_TENSORS:,} tensors")
    # Names and metadata may add any characters; nothing real comes near these bounds.
    if brackets > 2 * braces + 1_000 or commas > (MAX_DIMENSIONS + 5) * braces + 10_000:
        _refuse(path, "its header is not a list of tensors")


def _parse_header(content: bytes, path: Path) -> dict[str, Any]:
    """The entries of a header, by the fast parser where it can be shown that no key stands twice in it.

    An entry has four colons: after its name and after its three keys (what has others is refused later), the metadata
    one and one for each of its keys. Where the text has no more than what was parsed needs, nothing was overwritten.
    """
    entries: Any = None
    if not re.search(rb"\d{21}", content) and content.count(b"\\") <= MAX_ESCAPES:
        try:
            entries = json.loads(content.decode())
        except (ValueError, RecursionError):
            entries = None  # the careful parser says what is wrong
    if type(entries) is dict:
        needed = 4 * len(entries)
        if type(metadata := entries.get("__metadata__")) is dict:
            needed += len(metadata) - 3
        if content.count(b":") == needed:
            return entries
    entries = _parse_json(content, path)
    if type(entries) is not dict:
        _refuse(path, "its header is no JSON object")
    return entries


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        _refuse(path, f"it has a tensor with the impossible name {name[:80]!a}")
    if type(entry) is not dict or entry.keys() != _ENTRY:
        _refuse(path, f"tensor {name!a} is not described by exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        _refuse(path, f"tensor {name!a} has the unknown dtype {entry['dtype']!a:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        _refuse(path, f"tensor {name!a} has an impossible shape")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _refuse(path, f"tensor {name!a} has impossible data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:  # Python's integers do not overflow
        _refuse(path, f"tensor {name!a} of shape {shape} does not take the {end - begin:,} bytes it claims")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_layout(path: Path, tensors: Iterable[tuple[str, TensorInfo]], size: int) -> None:
    """Every tensor begins where the one before ends; the last ends with the file."""
    position = 0
    for name, info in sorted(tensors, key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps the one before" if info.begin < position else "leaves a gap before it"
            _refuse(path, f"tensor {name!a:.80} {what}")
        position = info.end
    if position != size:
        _refuse(
            path,
            f"its tensors take {position:,} bytes, but it holds {size:,}: it is truncated or has something appended",
        )


def _parse_json(content: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _refuse(path, f"it has the key {twice!a:.80} twice")
        return values

    def constant(text: str) -> NoReturn:
        _refuse(path, f"it holds {text}, which is no number of JSON")

    def whole(digits: str) -> int:
        if len(digits) > 20:  # 2**64 has 20; the time to read a number grows with the square of its length
            _refuse(path, f"it holds a number of {len(digits):,} digits")
        return int(digits)

    if content.count(b"\\") > MAX_ESCAPES:
        _refuse(path, f"it holds more than {MAX_ESCAPES:,} escape sequences")
    try:
        return json.loads(content.decode(), object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
    except UnicodeDecodeError:
        _refuse(path, "it is not UTF-8")
    except (ValueError, RecursionError) as error:
        _refuse(path, f"it is not valid JSON ({str(error)[:80]})")


def _check_depth(values: Any, path: Path) -> None:
    level = [values]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[Any] = []
        for value in level:
            if type(value) is dict:
                inner.extend(value.values())
            elif type(value) is list:
                inner.extend(value)
        level = inner
    if any(type(value) in (dict, list) for value in level):
        _refuse(path, f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def _read_into(stream: io.FileIO, view: memoryview) -> int:
    """Fills a view; one system call reads 2 GiB at most."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def _memory() -> int:
    """Bytes of physical memory; a file of more cannot be read whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _refuse(
    path: Path, why: str, mend: str = "download or save it again; if it came from somebody else, do not trust it"
) -> NoReturn:
    raise IntegrityError(f"{path.name} was refused: {why}", where=str(path), mend=mend)
