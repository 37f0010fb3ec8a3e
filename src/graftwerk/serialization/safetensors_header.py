"""The header of a safetensors file, checked completely by our own code.

Every tensor's bytes begin exactly where those before it end, and the last end with the file: so neither overlaps, gaps
nor overflowing sizes can exist. What parsing may cost is bounded before it is done.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.serialization.strict_json import MAX_ESCAPES, parse_json, refuse

MAX_HEADER_BYTES = 2**20
"""About 8,000 tensors; a hostile header of this size is still refused within 100 ms."""
MAX_TENSORS = 12_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
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
_ENTRY = {"dtype", "shape", "data_offsets"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checked header: ``begin`` and ``end`` count bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_of(tensors: Mapping[str, Tensor]) -> tuple[list[str], bytes]:
    """Return the header of a safetensors file for tensors of any shape.

    Args:
        tensors: The tensors by name. Their order does not matter.

    Returns:
        The names in the order of the data in the file, and the text of the header.
    """
    # The widest types first, so that every tensor begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return names, text + b" " * (-len(text) % 8)


def check_writable(tensors: Mapping[str, Tensor], path: Path, *, scale: int = 1) -> None:
    """Check, before tensors are written, that their file could be read again.

    Args:
        tensors: The tensors by name, any shape.
        path: The file to write, for messages.
        scale: As for `checked_header`.

    Raises:
        ConfigError: There are too many tensors, or the reader would refuse a name.
    """
    text = header_of(tensors)[1]
    try:
        if len(text) > scale * MAX_HEADER_BYTES:
            refuse(path, f"its header would have {len(text):,} bytes; at most {scale * MAX_HEADER_BYTES:,} are read")
        checked_header(text, path, sum(tensor.nbytes for tensor in tensors.values()), scale=scale)
    except IntegrityError as error:
        raise ConfigError(
            f"{path.name} could be written, but not be read again: {error.what.partition(': ')[2]}",
            where=str(path),
            hint="adapt fewer modules: method.target_modules, method.layers",
        ) from None


def checked_header(content: bytes, path: Path, data_size: int, *, scale: int = 1) -> dict[str, TensorInfo]:
    """Return the tensors that a header describes, in its order.

    Args:
        content: The header's JSON text.
        path: The file, for messages.
        data_size: Bytes that follow the header.
        scale: Factor on `MAX_TENSORS`.

    Raises:
        IntegrityError: The header is not valid in every detail.
    """
    _check_outline(content, path, scale * MAX_TENSORS)
    with uncollected():
        return _understood(content, path, data_size)


def _understood(content: bytes, path: Path, data_size: int) -> dict[str, TensorInfo]:
    entries = _parse_header(content, path)
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        refuse(path, "its `__metadata__` is not a mapping from text to text")
    header = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, header.items(), data_size)
    return header


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable the cycle collector in the block; with thousands of new objects it would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_outline(content: bytes, path: Path, most: int) -> None:
    """Bound the cost of parsing beforehand: every tensor has one brace, two brackets, few commas."""
    if not content.startswith(b'{"') and content.rstrip() != b"{}":
        refuse(path, "its header is no JSON object")
    braces, brackets, commas = content.count(b"{"), content.count(b"["), content.count(b",")
    if braces > most:
        refuse(path, f"its header lists more than {most:,} tensors")
    # Names and metadata may add any characters; nothing real comes near these bounds.
    if brackets > 2 * braces + 1_000 or commas > (MAX_DIMENSIONS + 5) * braces + 10_000:
        refuse(path, "its header is not a list of tensors")


def _parse_header(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a header, by the fast parser if it can be shown that it has no key twice.

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
    entries = parse_json(content, path)
    if type(entries) is not dict:
        refuse(path, "its header is no JSON object")
    return entries


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        refuse(path, f"it has a tensor with the impossible name {name[:80]!a}")
    if type(entry) is not dict or entry.keys() != _ENTRY:
        refuse(path, f"tensor {name!a} is not described by exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        refuse(path, f"tensor {name!a} has the unknown dtype {entry['dtype']!a:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        refuse(path, f"tensor {name!a} has an impossible shape")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        refuse(path, f"tensor {name!a} has impossible data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:  # Python's integers do not overflow
        refuse(path, f"tensor {name!a} of shape {shape} does not take the {end - begin:,} bytes it claims")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_layout(path: Path, tensors: Iterable[tuple[str, TensorInfo]], size: int) -> None:
    """Raise IntegrityError unless each tensor begins where the one before ends, and the last ends with the file."""
    position = 0
    for name, info in sorted(tensors, key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps the one before" if info.begin < position else "leaves a gap before it"
            refuse(path, f"tensor {name!a:.80} {what}")
        position = info.end
    if position != size:
        refuse(
            path,
            f"its tensors take {position:,} bytes, but it holds {size:,}: it is truncated or has something appended",
        )
