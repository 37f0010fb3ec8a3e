"""Compressed files, expanded in memory within bounds: .gz, .bz2, .xz, .zst, and .zip with one member.

Nothing is ever unpacked onto the disk, so a member's name can lead nowhere. A file that expands beyond all proportion
is refused while it is read, before it fills the memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

from graftwerk.errors import DataError, EnvironmentFault, IntegrityError

MAX_RATIO = 200
"""Bytes that one compressed byte may stand for. Text reaches 30; a bomb needs a thousand and more."""
FREE_BYTES = 1 << 24
"""Up to here no ratio counts: a small file of the same line over and over is no attack."""
_PIECE = 1 << 20


def _zst(path: Path) -> IO[bytes]:
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise EnvironmentFault(
            "reading .zst needs the package zstandard", where=str(path), mend="pip install zstandard"
        ) from None
    opened: IO[bytes] = zstandard.open(path, "rb")
    return opened


def _zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    return archive.open(_member(archive, path))


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zst,
    ".zip": _zip,
}


def plain_name(path: Path) -> str:
    """The name without the ending of the compression; for a zip, its member's.

    Raises:
        DataError: a zip with several members, or with an encrypted one.
        IntegrityError: no zip at all.
    """
    ending = path.suffix.lower()
    if ending == ".zip" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                return _member(archive, path).filename
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"not a readable zip file: {error}", where=str(path)) from None
    return path.stem if ending in OPENERS else path.name


def read_bytes(path: Path) -> bytes:
    """The content of a file, expanded where its ending says that it is compressed.

    Raises:
        IntegrityError: damaged, cut off, or a file that expands beyond all proportion.
        EnvironmentFault: the package for this compression is not installed.
    """
    return path.read_bytes() if path.suffix.lower() not in OPENERS else b"".join(pieces(path))


def pieces(path: Path) -> Generator[bytes, None, None]:
    """The content of a file, expanded, piece by piece. Raises as `read_bytes` does."""
    open_it = OPENERS.get(path.suffix.lower())
    limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    size = 0
    if open_it is None:
        with path.open("rb") as plain:
            while piece := plain.read(_PIECE):
                yield piece
        return
    try:
        with open_it(path) as file:
            while piece := file.read(_PIECE):
                size += len(piece)
                if size > limit:
                    raise IntegrityError(
                        f"the file expands to more than {MAX_RATIO} times its {path.stat().st_size:,} bytes",
                        where=str(path),
                        mend="if you trust it, expand it yourself and give the plain file",
                    )
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise IntegrityError(f"the compressed file is damaged: {error}", where=str(path)) from None
    except Exception as error:
        # zstandard's own error is none of Python's, and its package need not be there to be named.
        if type(error).__name__ != "ZstdError":
            raise
        raise IntegrityError(f"the compressed file is damaged: {error}", where=str(path)) from None


class Expanded(io.RawIOBase):
    """The content of a file, expanded, as a binary file that is read once from its beginning. Raises as `pieces`."""

    def __init__(self, path: Path) -> None:
        self._pieces, self._rest = pieces(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        named = ", ".join(info.filename for info in members[:5])
        raise DataError(
            f"the zip file holds {len(members):,} files, and rows are read from one",
            where=str(path),
            mend=f"unpack it and name the files ({named})" if members else "it is empty",
        )
    if members[0].flag_bits & 1:
        raise DataError("the zip file is encrypted", where=str(path), mend="unpack it")
    return members[0]
