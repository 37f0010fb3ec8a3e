"""The content of files, read within bounds; .gz, .bz2, .xz, .zst, and .zip with one member expanded in memory.

Nothing is ever unpacked onto the disk, so a member's name can lead nowhere. A file that expands beyond all proportion,
anywhere in it, is refused while it is read, before it fills the memory; so is one that the memory could not hold.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any, NoReturn

from graftwerk.errors import DataError, IntegrityError, ResourceError
from graftwerk.machine import available
from graftwerk.resource_paths import open_regular

MAX_RATIO = 200
"""Bytes that one compressed byte may stand for. Text reaches 30; a bomb needs a thousand and more."""
FREE_BYTES = 1 << 24
"""Up to here no ratio counts: a small file of the same line over and over is no attack."""
WINDOW_BYTES = 1 << 25
"""So many bytes in a row may be of a higher ratio, if the whole is not."""
MAX_DIRECTORY_BYTES = 1 << 20
"""Of a zip file's list of members; rows are read from one with a single member."""
MEMORY_SHARE = 0.5
"""Of the available memory that the text of a file may take; rows made of it take several times as much."""
_PIECE = 1 << 20


def _zst(raw: IO[bytes], path: Path) -> IO[bytes]:
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ResourceError(
            "reading .zst needs the package zstandard", where=str(path), hint="pip install zstandard"
        ) from None
    opened: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(raw)
    return opened


def _zip(raw: IO[bytes], path: Path) -> IO[bytes]:
    archive = _archive(raw, path)
    return archive.open(_member(archive, path))


OPENERS: dict[str, Callable[[Any, Path], Any]] = {
    ".gz": lambda raw, path: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw, path: bz2.BZ2File(raw),
    ".xz": lambda raw, path: lzma.LZMAFile(raw),  # noqa: SIM115
    ".zst": _zst,
    ".zip": _zip,
}
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
)
"""What the libraries raise for files that are not as they should be; zipfile in particular raises nearly anything."""


def plain_name(path: Path) -> str:
    """Return the name without the suffix of the compression; for a zip, its member's.

    Raises:
        DataError: The zip has several members, or an encrypted one.
        IntegrityError: It is not a readable zip file.
    """
    ending = path.suffix.lower()
    if ending == ".zip" and path.is_file():
        try:
            with opened(path) as raw, _archive(raw, path) as archive:
                return _member(archive, path).filename
        except _DAMAGE as error:
            if isinstance(error, PermissionError):
                raise
            raise IntegrityError(f"not a readable zip file: {error}", where=str(path)) from None
    return path.stem if ending in OPENERS else path.name


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if its suffix names a compression.

    Raises:
        IntegrityError: It is damaged, truncated, or expands beyond all proportion.
        ResourceError: The package for this compression is not installed, or the memory does not suffice.
        DataError: It is not a regular file.
    """
    free = available()
    most = 1 << 62 if free is None else int(MEMORY_SHARE * free)
    content, size = [], 0
    for piece in pieces(path):
        size += len(piece)
        if max(size, path.stat().st_size) > most:
            raise ResourceError(
                f"the content of {path.name} does not fit into the memory: more than {most:,} bytes",
                where=str(path),
                hint="data.streaming=true reads rows while they are trained on; or give a part of the file",
            )
        content.append(piece)
    return b"".join(content)


def opened(path: Path) -> io.FileIO:
    """Open a regular file for reading, without decompression.

    Raises:
        DataError: It is not a regular file.
        OSError: It cannot be opened.
    """
    try:
        return open_regular(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}", where=str(path), hint="give a regular file") from None


def pieces(path: Path) -> Generator[bytes, None, None]:
    """Yield the content of a file in chunks, decompressed if its suffix names a compression.

    Raises:
        IntegrityError: The compressed file is damaged, or expands beyond all proportion.
        ResourceError: The package for this compression is not installed.
        DataError: It is not a regular file.
    """
    open_it = OPENERS.get(path.suffix.lower())
    if open_it is None:
        with opened(path) as plain:
            while piece := plain.read(_PIECE):
                yield piece
        return
    try:
        with opened(path) as raw, open_it(raw, path) as file:
            proportion = _Proportion(path, raw)
            while piece := file.read(_PIECE):
                proportion.check(len(piece))
                yield piece
    except _DAMAGE as error:
        if isinstance(error, PermissionError):
            raise
        raise IntegrityError(f"the compressed file is damaged: {error}", where=str(path)) from None
    except Exception as error:
        # zstandard's own error is none of Python's, and its package need not be there to be named.
        if type(error).__name__ != "ZstdError":
            raise
        raise IntegrityError(f"the compressed file is damaged: {error}", where=str(path)) from None


class _Proportion:
    """Limit on the compression ratio, of the whole file and of each window of it, that stops a decompression bomb."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        self._size = path.stat().st_size
        self._out = self._window_out = self._window_in = 0

    def check(self, count: int) -> None:
        self._out += count
        if self._out > max(FREE_BYTES, MAX_RATIO * self._size):
            self._refuse(self._size)
        if self._out - self._window_out < WINDOW_BYTES:
            return
        taken = self._raw.tell() - self._window_in
        if self._out - self._window_out > MAX_RATIO * max(taken, 1):
            self._refuse(taken)
        self._window_out, self._window_in = self._out, self._raw.tell()

    def _refuse(self, compressed: int) -> NoReturn:
        raise IntegrityError(
            f"the file expands to more than {MAX_RATIO} times its bytes ({compressed:,} of them)",
            where=str(self._path),
            hint="if you trust it, expand it yourself and give the plain file",
        )


class Expanded(io.RawIOBase):
    """The content of a file, expanded, as a binary file that is read once from its beginning. Raises as `pieces`."""

    def __init__(self, path: Path) -> None:
        self._pieces, self._rest = pieces(path), memoryview(b"")

    def readable(self) -> bool:
        """Return True, as `io.RawIOBase` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from its beginning, and return the number of bytes; 0 at the end of the content."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        """Close the underlying file."""
        self._pieces.close()
        super().close()


def _archive(raw: IO[bytes], path: Path) -> zipfile.ZipFile:
    """Return the zip file; the list of members is not read if it is long."""
    ending = zipfile._EndRecData(raw)  # type: ignore[attr-defined]
    if ending and ending[5] > MAX_DIRECTORY_BYTES:  # bytes of the list
        raise DataError(
            f"the zip file lists {ending[4]:,} members, and rows are read from one", where=str(path), hint="unpack it"
        )
    raw.seek(0)
    return zipfile.ZipFile(raw)


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        named = ", ".join(info.filename for info in members[:5])
        raise DataError(
            f"the zip file holds {len(members):,} files, and rows are read from one",
            where=str(path),
            hint=f"unpack it and name the files ({named})" if members else "it is empty",
        )
    if members[0].flag_bits & 1:
        raise DataError("the zip file is encrypted", where=str(path), hint="unpack it")
    return members[0]
