"""Hidden states of many rows, in memory or in a file that is mapped into it.

File: a line that names its format, a JSON header (key, tokens, width, type) padded so that the data starts at a
multiple of `ALIGN`, the states of all rows one after the other without padding, and a BLAKE2b digest of everything
before it. It is written beside its place and moved there when it is complete and on the disk. The digest is checked
when the file is opened, so a damaged file is computed again. Two processes may write the same file: the bytes are the
same, and the last one's stay.

Legend: N tokens of all rows, d width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.machine import is_running
from graftwerk.own_files import refuse_link

MAGIC = b"graftwerk trunk 1\n"
ALIGN = 4096
ENDING = ".trunk"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DIGEST = 32
_CHUNK = 1 << 24
MARGIN = 1 << 30
"""Bytes of a disk that are left free."""


class MemoryStates:
    """Hidden states (N, d) in memory, filled from the front.

    Args:
        tokens: N, tokens of all rows.
        width: d, width of the hidden states.
        dtype: Type of the states.
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.states = torch.empty(tokens, width, dtype=dtype, device="cpu")
        self._filled = 0

    def add(self, states: Tensor) -> None:
        """Append the states (n, d) of the next rows."""
        self.states[self._filled : self._filled + len(states)].copy_(states)
        self._filled += len(states)

    def finished(self) -> Tensor:
        """Return all states (N, d)."""
        assert self._filled == len(self.states)
        return self.states

    def abandon(self) -> None:
        """Free the memory."""
        self.states = torch.empty(0, device="cpu")


class FileStates:
    """Hidden states (N, d) in a file, filled from the front.

    Args:
        path: The file, which appears when it is complete.
        key: Digest of everything that the states depend on.
        tokens: N, tokens of all rows.
        width: d, width of the hidden states.
        dtype: Type of the states.

    Raises:
        OSError: There is no space, or no permission.
        IntegrityError: The folder is a link.
    """

    def __init__(self, path: Path, key: str, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.path, self.key, self.dtype, self.shape = path, key, dtype, (tokens, width)
        refuse_link(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_abandoned(path.parent)
        needed = tokens * width * dtype.itemsize
        if shutil.disk_usage(path.parent).free < needed + MARGIN:
            raise OSError(f"{needed / 1e9:.2f} GB do not fit on the disk of {path.parent}, of which 1 GiB is left free")
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        self._stream = self._partial.open("xb")
        self._digest = hashlib.blake2b(digest_size=_DIGEST)
        self._write(_head(key, tokens, width, dtype))

    def _write(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._digest.update(content)

    def add(self, states: Tensor) -> None:
        """Append the states (n, d) of the next rows."""
        flat = states.detach().to("cpu", self.dtype).contiguous().reshape(-1)
        self._write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def finished(self) -> Tensor:
        """Move the file to its place, map it, and return all states (N, d)."""
        self._stream.write(self._digest.digest())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self.path)
        return _mapped(self.path, self.shape, self.dtype)

    def abandon(self) -> None:
        """Delete the unfinished file."""
        with suppress(OSError):
            self._stream.close()
        self._partial.unlink(missing_ok=True)


def open_file(path: Path, key: str, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor | None, str | None]:
    """Map the states of a file that is intact and has this key.

    Args:
        path: The file.
        key: Digest of everything that the states depend on.
        tokens: N, tokens of all rows.
        width: d, width of the hidden states.
        dtype: Type of the states.

    Returns:
        The states (N, d) and None, or None and the reason; None and None if there is no file.

    Raises:
        IntegrityError: The file or its folder is a link.
    """
    head = _head(key, tokens, width, dtype)
    refuse_link(path.parent)
    refuse_link(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(len(head)) != head:
                return None, "it is of other rows, weights or settings, or its beginning is damaged"
            if size != len(head) + tokens * width * dtype.itemsize + _DIGEST:
                return None, f"it has {size:,} bytes, which is not what its rows need"
            digest = hashlib.blake2b(head, digest_size=_DIGEST)
            left = size - len(head) - _DIGEST
            while left and (chunk := stream.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            if stream.read() != digest.digest():
                return None, "its digest does not fit its content"
        states = _mapped(path, (tokens, width), dtype)
        with suppress(OSError):
            os.utime(path)  # what was used last goes last
        return states, None
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, str(error)


def _head(key: str, tokens: int, width: int, dtype: torch.dtype) -> bytes:
    values: dict[str, Any] = {"key": key, "tokens": tokens, "width": width, "dtype": str(dtype)}
    text = MAGIC + json.dumps(values, sort_keys=True).encode() + b"\n"
    return text + b" " * (-len(text) % ALIGN)


def _mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    import numpy as np

    tokens, width = shape
    # copy-on-write: torch has no tensors that cannot be written to
    raw = np.memmap(path, np.uint8, "c", offset=ALIGN, shape=(tokens * width * dtype.itemsize,))
    return torch.from_numpy(raw).view(dtype).view(tokens, width)


def _drop_abandoned(folder: Path) -> None:
    """Delete the unfinished files of processes that were killed."""
    for path in folder.glob(f".*{ENDING}.*.*"):
        process = path.name.split(ENDING + ".")[-1].split(".")[0]
        if process.isdecimal() and not is_running(int(process)):
            path.unlink(missing_ok=True)


def chunks(lengths: Sequence[int], most_rows: int, most_tokens: int) -> Iterator[range]:
    """Yield the places of rows that are computed together, a pure function of the lengths.

    Args:
        lengths: Tokens of each row, longest first.
        most_rows: Most rows of a chunk.
        most_tokens: Most tokens of a chunk, padding included.
    """
    start = 0
    while start < len(lengths):
        count = max(1, min(most_rows, most_tokens // max(lengths[start], 1)))
        yield range(start, min(start + count, len(lengths)))
        start += count
