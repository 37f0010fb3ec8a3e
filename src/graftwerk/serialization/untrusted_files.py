"""The one gate through which every foreign file comes in.

Weights come as safetensors and settings as JSON; nothing else is ever read, and a pickle, whatever it calls itself, is
refused without being opened further than its first bytes. A safetensors header is checked whole (`header.py`) before
data is read and before memory is reserved for it. The data is then read through the same open file: nobody can exchange
it between check and use, and no tensor stays mapped onto a file that may change later.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from graftwerk.errors import IntegrityError, ResourceError
from graftwerk.resource_paths import open_regular
from graftwerk.serialization.safetensors_header import DTYPES, MAX_HEADER_BYTES, TensorInfo, checked_header
from graftwerk.serialization.strict_json import MAX_JSON_BYTES, SEAL, check_seal, parse_object, refuse

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "TensorInfo",
    "read_header",
    "read_json",
    "read_sealed",
    "read_tensors",
    "refuse_pickles",
    "understood",
]

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
_PIECE = 2**16
_CONVERT = (
    "ask its author for a safetensors file, or convert it where you can afford to run its code "
    "(PEFT: `save_pretrained(folder, safe_serialization=True)`)"
)


def read_tensors(
    path: Path | str,
    *,
    max_bytes: int | None = None,
    written: Mapping[str, int] | None = None,
    scale: int = 1,
) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file on the CPU, in one block of memory.

    Args:
        path: The file.
        max_bytes: Largest size of the data to accept, or None for the machine's memory.
        written: ``{bytes, crc32}`` of the file as it was written, or None if unknown. The file must match; the checksum
            is taken of the bytes that are used, in the same pass.
        scale: Factor on the usual limit of the header, for files of ours that hold several tensors for one.

    Returns:
        Tensors by name, any shape, in the order of the file.

    Raises:
        IntegrityError: It is a pickle or archive under any name, damaged, not the file that was written, or its header
            is not valid in every detail.
        ResourceError: It does not exist or cannot be read.
    """
    path = Path(path)
    with _opened(path) as stream:
        if written is not None and os.fstat(stream.fileno()).st_size != written["bytes"]:
            refuse_changed(path)
        crc = Checksum()
        try:
            header = _checked_header(stream, path, _memory() if max_bytes is None else max_bytes, crc, scale)
        except IntegrityError:
            if written is not None and checksum(path) != written:
                refuse_changed(path)
            raise
        block = torch.empty(max((info.end for info in header.values()), default=0), dtype=torch.uint8, device="cpu")
        ordered = sorted(header.items(), key=lambda item: (item[1].begin, item[1].end))
        done = _read_into(stream, memoryview(block.numpy().data), crc if written is not None else None)
        if done < len(block):
            name = next(name for name, info in ordered if info.end > done)
            refuse(path, f"it ends within tensor `{name!a}`")
        if written is not None and crc.value != written["crc32"]:
            refuse_changed(path)
    return {name: _tensor(block, info) for name, info in ordered}


def _tensor(block: Tensor, info: TensorInfo) -> Tensor:
    """Return a tensor that shares the block's memory, but not its version counter."""
    begin, size = divmod(info.begin, info.dtype.itemsize)
    if size or not info.end - info.begin:  # not at a place where one of this type may lie
        return block[info.begin : info.end].clone().view(info.dtype).reshape(info.shape)
    strides = [1]
    for length in reversed(info.shape[1:]):
        strides.append(strides[-1] * length)
    shared = torch.empty(0, dtype=info.dtype, device="cpu")
    return shared.set_(block.untyped_storage(), begin, info.shape, strides[::-1] if info.shape else ())


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file, not its data. Raises as `read_tensors` does."""
    path = Path(path)
    with _opened(path) as stream:
        return _checked_header(stream, path, None, Checksum())


def read_json(path: Path | str, *, scale: int = 1) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Args:
        path: The file.
        scale: Factor on the usual limits of bytes, values and escapes.

    Raises:
        IntegrityError: it is larger than 1 MiB, deeper than 12 levels, no UTF-8, no JSON object, has a key twice, or
            holds too many values, half a character, or a number that JSON does not know (NaN, Infinity) or that 64 bits
            do not hold.
        ResourceError: it does not exist or cannot be read.
    """
    path = Path(path)
    with _opened(path) as stream:
        content = stream.read(scale * MAX_JSON_BYTES + 1)
    return parse_object(content, path, scale)


def read_sealed(path: Path | str, *, scale: int = 1) -> dict[str, Any]:
    """Read a JSON object of our own and compare it with the digest that it holds.

    The digest is left out of the result. A file of an older version has none, which is logged.

    Raises:
        IntegrityError: it was changed, or for the reasons of `read_json`.
        ResourceError: it does not exist or cannot be read.
    """
    path = Path(path)
    values = read_json(path, scale=scale)
    if not check_seal(values, path):
        logging.getLogger("graftwerk").info("%s has no digest of its own, so a change of it would not be seen", path)
    return {key: value for key, value in values.items() if key != SEAL}


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn errors in the block into IntegrityError: a wrong type or missing key is the fault of the file read.

    Raises:
        IntegrityError: A value of the file is missing or has a wrong type.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"{path.name} does not say what it should ({type(error).__name__}: {str(error)[:120]})",
            where=str(path),
            hint="take it from a copy, or make it again",
        ) from error


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Raise if a folder without ``wanted`` holds a pickle of it. The pickle is not opened.

    Raises:
        IntegrityError: A file with the same stem has a suffix of pickles.
    """
    stem = Path(wanted).stem
    for entry in sorted(os.listdir(folder)):
        found = Path(entry)
        if found.suffix.lower() in PICKLE_SUFFIXES and found.name.split(".")[0] == stem:
            refuse(
                folder / entry,
                "it is a pickle, which can run any code when it is loaded, so it was not opened",
                _CONVERT,
            )


def _opened(path: Path) -> io.FileIO:
    """Open a file unbuffered if it is regular and neither its name nor its first bytes say pickle or archive."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        refuse(
            path, "it is a pickle by its name, which can run any code when it is loaded, so it was not opened", _CONVERT
        )
    try:
        stream = open_regular(path)
    except ValueError as error:
        refuse(path, str(error))
    except OSError as error:
        raise ResourceError(f"cannot read {path}: {error.strerror}", where=str(path), hint="check the path") from None
    try:
        start = os.pread(stream.fileno(), 24, 0)
        for magic, kind in _MAGIC:
            # A header of 640 bytes begins as pickles do (80 02), but only a header has its brace at byte 8.
            if start.startswith(magic) and start[8:9] != b"{":
                refuse(path, f"its first bytes say that it is {kind}", _CONVERT)
    except BaseException:
        stream.close()
        raise
    return stream


def _checked_header(
    stream: io.FileIO, path: Path, max_bytes: int | None, crc: Checksum, scale: int = 1
) -> dict[str, TensorInfo]:
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if size < 10 or length < 2:
        refuse(path, f"with {size:,} bytes it is too short for a safetensors file")
    if length > scale * MAX_HEADER_BYTES:
        refuse(path, f"its header claims {length:,} bytes; at most {scale * MAX_HEADER_BYTES:,} are read")
    if length > size - 8:
        refuse(path, f"its header claims {length:,} bytes, but the file has only {size:,}")
    if max_bytes is not None and size > max_bytes:
        refuse(path, f"it has {size:,} bytes; at most {max_bytes:,} are read here")
    content = stream.read(length)
    if len(content) != length:
        refuse(path, "it ends within its header")
    crc.add(start)
    crc.add(content)
    return checked_header(content, path, size - 8 - length, scale=scale)


def _read_into(stream: io.FileIO, view: memoryview, crc: Checksum | None) -> int:
    """Fill a view and return the number of bytes read.

    It reads small pieces: each is still in the processor's cache when its checksum is taken.
    """
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + _PIECE])
        if not count:
            break
        if crc is not None:
            crc.add(view[done : done + count])
        done += count
    return done


class Checksum:
    """CRC-32: against damage, not against forgery (who can write the folder can write the checksum)."""

    def __init__(self) -> None:
        self.bytes, self.value = 0, 0

    def add(self, content: bytes | memoryview) -> None:
        """Add the next bytes of the content."""
        self.value = zlib.crc32(content, self.value)
        self.bytes += len(content)


def checksum(path: Path) -> dict[str, int]:
    """Return the size and CRC-32 of a file."""
    crc = Checksum()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            crc.add(chunk)
    return {"bytes": crc.bytes, "crc32": crc.value}


def refuse_changed(path: Path) -> NoReturn:
    """Refuse a file whose checksum is not that of the file that was written.

    Raises:
        IntegrityError: Always.
    """
    raise IntegrityError(
        f"{path.name} is not the file that was written: it was damaged or changed",
        where=str(path),
        hint="take it from a copy; if it was changed on purpose, delete graftwerk.json beside it",
    )


def _memory() -> int:
    """Return the bytes of physical memory; a larger file cannot be read whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
