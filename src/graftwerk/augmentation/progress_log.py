"""Progress log of generation: a kill at any moment loses at most one batch.

A file of JSON lines beside the output file. The first line identifies the output; each further line is a finished
batch, flushed to disk before the next one begins. A line truncated by a kill is removed on resume. One process at a
time may write it; others get an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from graftwerk.errors import ConflictError, ResourceError
from graftwerk.own_files import open_own
from graftwerk.serialization.atomic import FAULTS

ENDING = ".unfinished"
FORMAT = 1


class Journal:
    """Open for reading what is done and for adding to it.

    Args:
        target: The file that is being made; the journal lies beside it, with `ENDING` behind its name.
        identity: What is being made: rows, settings. A log of something else is not resumed.
        keep: True to resume an existing journal, False to start a new one.

    Raises:
        ConflictError: another process writes it, or it is of something else.
        ResourceError: it cannot be written.
        IntegrityError: it is a link.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], *, keep: bool) -> None:
        self.path = journal_of(target)
        self.done: dict[str, list[Any]] = {}
        """What each batch, by its key, came to."""
        head = json.dumps({"format": FORMAT, **identity}, ensure_ascii=False, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = os.fdopen(open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
            try:
                _lock(self._file, self.path)
                self._read(head, keep)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise _fault(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, key: str, answers: list[Any]) -> None:
        """Append a finished batch; it is on disk when this returns."""
        self.done[key] = answers
        self._append(json.dumps([key, answers], ensure_ascii=False))

    def close(self) -> None:
        """Close the log's file, which also releases its lock."""
        self._file.close()

    def remove(self) -> None:
        """Remove the log, once the output is complete and stored."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _read(self, head: str, keep: bool) -> None:
        self._file.seek(0)
        good = 0
        lines = self._file.read().split(b"\n")[:-1] if keep else []
        for place, line in enumerate(lines):
            if place == 0:
                if line.decode("utf-8", "replace") != head:
                    raise ConflictError(
                        f"{self.path} was started with other rows or settings",
                        hint="use the rows and settings it was started with; or start over with --overwrite "
                        "(overwrite=True), or with another file",
                        recovered=str(self.path),
                    )
            else:
                try:
                    key, answers = json.loads(line)
                    self.done[str(key)] = list(answers)
                except (ValueError, TypeError):
                    break  # what comes after a damaged line was written by nobody we know
            good += len(line) + 1
        self._file.truncate(good)
        if good == 0:
            self._append(head)

    def _append(self, line: str) -> None:
        try:
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _fault(error, self.path) from error


def journal_of(target: Path) -> Path:
    """Return the path of the progress log of an augmented file, which stands beside it."""
    return target.with_name(target.name + ENDING)


def _lock(file: BinaryIO, path: Path) -> None:
    """Take the lock, which is held until the file is closed, also by a kill."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers at once are not noticed there
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConflictError(
            f"another process is making {path.name.removesuffix(ENDING)}",
            where=str(path),
            hint="wait for it, or give another file",
        ) from None


def _fault(error: OSError, path: Path) -> ResourceError:
    what, hint = FAULTS.get(error.errno or 0, (error.strerror or str(error), "write to another place"))
    kept = f"{path}, up to the last whole batch" if path.exists() else None
    return ResourceError(f"cannot write {path}: {what}", where=str(path), hint=hint, recovered=kept)
