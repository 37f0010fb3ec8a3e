"""One run per folder. The lock is a small JSON file that says who holds it, and a kernel lock (flock) on that file.

The kernel drops its lock with the process, so a killed run leaves none. What is written in the file names the holder,
and decides where the kernel cannot: file systems without flock, and a child process that outlived the run and
inherited the descriptor. A process is identified by boot id, pid namespace, pid and start time: pids are used again,
and a wall clock may jump.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from graftwerk.errors import ConflictError, ErrorReport, ResourceError
from graftwerk.machine import is_running, start_ticks
from graftwerk.own_files import open_own
from graftwerk.serialization.atomic import FAULTS
from graftwerk.training.run_dir import LOCK

PATIENCE = 60
"""Seconds that `wait_for` waits."""
_WRITING_SECONDS = 1.0
"""Longest time that a lock file may stay empty while its new holder writes its name."""


@dataclass(frozen=True)
class Holder:
    """A process, named so that no other will ever have the same name.

    Attributes:
        pid: Process id.
        started: Clock ticks after boot at which the process started, or None on systems without /proc.
        boot: Boot id of the machine.
        namespace: Namespace of process ids.
        host: Name of the machine.
    """

    pid: int
    started: int | None
    boot: str
    namespace: str
    host: str

    @classmethod
    def me(cls) -> Holder:
        """Return the holder that names this process."""
        return cls(
            pid=os.getpid(),
            started=start_ticks(os.getpid()),
            boot=_first_line("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
            host=socket.gethostname(),
        )

    def alive(self) -> bool | None:
        """Return whether that process runs, or None if it cannot be seen from here (another machine or container)."""
        me = Holder.me()
        if self.boot != me.boot:
            return False if self.host == me.host and self.boot and me.boot else None
        if self.host != me.host and not me.boot:
            return None
        if self.namespace != me.namespace:
            return None
        if self.started is None:
            return is_running(self.pid)
        return start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Lock a run folder from `acquire` to `release`; usable as a context manager.

    Args:
        folder: The run folder, made if it does not exist.

    Raises:
        ConflictError: On entering: another process holds the lock; the message names it.
        ResourceError: On entering: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> RunLock:
        """Take the lock.

        Raises:
            ConflictError: Another process holds it.
            ResourceError: The folder cannot be written.
        """
        patience = time.monotonic() + _WRITING_SECONDS
        while self._descriptor is None:
            descriptor = self._open()
            try:
                if self._take(descriptor, give_up=time.monotonic() > patience):
                    self._descriptor = descriptor
            except ErrorReport:
                self._leave_no_folder()
                raise
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        return self

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)  # while still locked: whoever opened it meanwhile sees that it was removed
        os.close(self._descriptor)
        self._descriptor = None
        self._leave_no_folder()

    def _open(self) -> int:
        """Open the lock file, and remember the folders that had to be made for it."""
        self._made += [folder for folder in self.path.parents if folder not in self._made and not folder.exists()]
        try:
            return _open(self.path)
        except ErrorReport:
            self._leave_no_folder()
            raise

    def _leave_no_folder(self) -> None:
        """Remove folders that were made for the lock alone and are still empty: nothing has come of this run."""
        for folder in self._made:  # the innermost first
            try:
                folder.rmdir()
            except OSError:  # something is in it, or somebody else has removed it
                break
        self._made = []

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self, descriptor: int, *, give_up: bool) -> bool:
        """Try once to take the lock; return False to try again."""
        locked = _flock(descriptor)
        if not _same_file(descriptor, self.path):
            return False
        holder = _read(descriptor)
        alive = holder.alive() if holder is not None else None
        if locked is False:
            if holder is not None and alive is False:  # a child of the dead holder keeps the kernel's lock
                self.path.unlink(missing_ok=True)
                return False
            if holder is None and not give_up:
                time.sleep(0.02)
                return False
            raise _held(self.path, holder)
        if holder is not None and (alive or (alive is None and locked is None)):
            raise _held(self.path, holder)
        content = json.dumps(asdict(Holder.me())).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
        return True


def wait_for(folder: Path) -> None:
    """Wait until the process of a killed comparison or search has saved its run and given its folder free.

    Raises:
        ConflictError: It is still in use after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            RunLock(folder).acquire().release()
            return
        except ConflictError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _held(path: Path, holder: Holder | None) -> ConflictError:
    return ConflictError(
        f"{path.parent} is in use by {holder or 'another process'}",
        where=str(path),
        hint="wait for it, stop it, or choose another output_dir"
        + (f"; if that machine is surely off, delete {path}" if holder is not None and holder.alive() is None else ""),
    )


def _open(path: Path, tries: int = 20) -> int:
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open_own(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # who held it took the empty folder along at this moment
            if tries == 1:
                raise
            return _open(path, tries - 1)
    except (FileExistsError, NotADirectoryError):
        raise ConflictError(
            f"{path.parent} is a file; a run needs a folder", hint="choose another output_dir"
        ) from None
    except OSError as error:
        what, hint = FAULTS.get(error.errno or 0, (str(error), "choose another output_dir"))
        raise ResourceError(f"cannot write into {path.parent}: {what}", where=str(path.parent), hint=hint) from None


def _flock(descriptor: int) -> bool | None:
    """Return True if the file is locked now, False if another process has it, None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            return None
        raise
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder | None:
    """Return the holder that the file names.

    None stands for an empty or half-written file, whose writer died writing it, and for anything that no lock says.
    """
    try:
        holder = Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, RecursionError, OSError):
        return None
    numbers = (holder.pid, 0 if holder.started is None else holder.started)
    texts = (holder.boot, holder.namespace, holder.host)
    named = (
        all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and 0 < holder.pid < 2**31
        and all(isinstance(text, str) and (not text or text.isprintable()) for text in texts)
    )
    return holder if named else None


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
