"""Files and folders that appear whole or not at all.

Everything is written beside its destination under a hidden name, forced to the disk, and then renamed. A folder that
exists already is exchanged with the new one in one step where the system can do that (Linux: ``renameat2``); elsewhere
the old one is moved to a hidden name first, and `recover` brings it back should the process die between two renames.
So at any moment, also after a power cut, a reader finds the old content or the new, never a mixture.

Hidden names, all in the destination's own folder (a rename must not cross file systems):
``.<name>.partial-<pid>-<token>`` is being written, ``.<name>.replaced`` is an old folder on its way out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from graftwerk.errors import ConflictError, GraftwerkError, ResourceError
from graftwerk.machine import is_running
from graftwerk.own_files import refuse_link

FAULTS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free that much space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free that much space, or write to another disk"),
    errno.EFBIG: (
        "the file is larger than the allowed file size",
        "raise the limit (`ulimit -f`), or write to another disk",
    ),
    errno.EIO: ("the disk reported an input/output error", "check the disk (kernel log), or write to another one"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission denied", "choose a folder that you may write to, or change its permissions"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write to, or change its permissions"),
}
"""System errors that are the environment's fault: what to call them, and how to mend them."""

Read = TypeVar("Read")
TRIES = 100
"""Times that a folder is read again which somebody replaces while it is read."""
_OS_ERROR_IN_TEXT = re.compile(r"\(os error (\d{1,3})\)")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def write_folder(
    target: Path | str, fill: Callable[[Path], None], *, bytes_needed: int | None = None, own: bool = False
) -> Path:
    """Write a folder atomically; an existing one is replaced.

    Args:
        target: The folder. Missing parents are created. If it is a link, the folder it points to is replaced.
        fill: Called with an empty folder beside ``target``; what it writes there becomes the content.
        bytes_needed: Estimated bytes to write, checked against the free space first, and named in errors.
        own: True if the name is ours and not the user's, so that a link there is refused.

    Returns:
        The folder written.

    Raises:
        ResourceError: No space, too large, read-only, no permission, or a broken disk. Content at ``target`` is
            untouched and no temporary file is left.
        ConflictError: ``target`` is a file.
        IntegrityError: ``target`` is our own and a link.
    """
    target = _resolved(target, own)
    with _faults_explained(target, bytes_needed) as writing:
        partial = writing.partial
        _make_parents(target.parent)
        recover(target)
        _remove_stale(target)
        if target.exists() and not target.is_dir():
            raise ConflictError(f"{target} is a file, and a folder is to be written there", hint="choose another place")
        _check_space(target.parent, bytes_needed)
        os.mkdir(partial)
        fill(partial)
        _sync_tree(partial)
        _swap_folder(partial, target)
        writing.in_place = True
        _sync_folder(target.parent)
    return target


def write_file(
    target: Path | str,
    content: bytes | str | Callable[[BinaryIO], None],
    *,
    own: bool = False,
) -> Path:
    """Write a file atomically; an existing one is replaced and keeps its permissions.

    Args:
        target: The file. Missing parents are created. If it is a link, the file it points to is replaced.
        content: Bytes, text (stored as UTF-8), or a function that writes to an open binary file.
        own: As for `write_folder`.

    Raises:
        ResourceError: as for `write_folder`.
        ConflictError: ``target`` is a folder.
        IntegrityError: ``target`` is our own and a link.
    """
    target = _resolved(target, own)
    if isinstance(content, str):
        content = content.encode()
    bytes_needed = len(content) if isinstance(content, bytes) else None
    with _faults_explained(target, bytes_needed) as writing:
        partial = writing.partial
        _make_parents(target.parent)
        _remove_stale(target)
        if target.is_dir():
            raise ConflictError(f"{target} is a folder, and a file is to be written there", hint="choose another place")
        _check_space(target.parent, bytes_needed)
        with open(partial, "xb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            if target.exists():
                os.fchmod(stream.fileno(), target.stat().st_mode & 0o7777)
            os.fsync(stream.fileno())
        os.replace(partial, target)
        writing.in_place = True
        _sync_folder(target.parent)
    return target


def _resolved(target: Path | str, own: bool) -> Path:
    if own:
        refuse_link(Path(target))
    return Path(os.path.realpath(target))


def recover(target: Path | str) -> Path:
    """Finish a replacement that a killed process left half done; call it before reading a folder.

    Returns:
        The folder with the content: ``target``, or the hidden name if the disk does not let it be renamed back.
    """
    target = Path(os.path.realpath(target))
    replaced = _replaced(target)
    if not os.path.lexists(replaced) or os.path.islink(replaced):
        return target
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        return target
    try:
        os.rename(replaced, target)
    except OSError:
        return target if target.exists() else replaced
    return target


def read_steadily(folder: Path | str, read: Callable[[], Read]) -> Read:
    """Read several files of a folder that `write_folder` may replace meanwhile: all of them from one state of it.

    Args:
        folder: That folder.
        read: Reads it. Called again where the folder was replaced while it read, whatever came of that.

    Returns:
        What ``read`` gives.
    """
    for last in range(1, TRIES + 1):
        before = _state_of(folder)
        try:
            result = read()
        except (GraftwerkError, OSError):
            if _state_of(folder) == before or last == TRIES:
                raise
        else:
            if _state_of(folder) == before or last == TRIES:
                return result
    raise AssertionError  # the last try returns or raises


def _state_of(folder: Path | str) -> tuple[int, ...] | None:
    """Return values that change when another folder takes this one's name; inode numbers alone are used again."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns


@dataclass
class _Writing:
    """A file or folder on its way to its place; ``in_place``: it has been renamed to it."""

    partial: Path
    in_place: bool = False


@contextmanager
def _faults_explained(target: Path, bytes_needed: int | None) -> Iterator[_Writing]:
    """Yield a free hidden name, remove leftovers under it, and turn system errors into `ResourceError`."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    writing = _Writing(partial)
    try:
        yield writing
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise _fault(number, target, writing, bytes_needed, error) from error
    finally:
        _remove(partial)


def _system_error(error: Exception) -> int | None:
    """Return the errno of a system error, also if a library hid it in its own error's text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR_IN_TEXT.search(str(error))):
        number = int(found.group(1))
    return number if number in FAULTS else None


def _fault(number: int, target: Path, writing: _Writing, bytes_needed: int | None, error: Exception) -> ResourceError:
    what, hint = FAULTS[number]
    if bytes_needed is None:
        needed = f"at least {_size(writing.partial):,} bytes are needed"
    else:
        needed = f"{bytes_needed:,} bytes are needed"
    kept = f"{target} as it was before" if target.exists() else None
    if writing.in_place:
        kept = f"{target} as it was to be written; whether it outlives a power cut is not known"
    return ResourceError(
        f"cannot write {target}: {what}; {needed} ({error})", where=str(target), hint=hint, recovered=kept
    )


def _check_space(folder: Path, bytes_needed: int | None) -> None:
    if bytes_needed is None:
        return
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free")


def _swap_folder(new: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not _exchange(new, target):  # else the old content now lies under the partial name, and is removed there
        replaced = _replaced(target)
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        try:
            os.rename(new, target)
        except BaseException:
            recover(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; return False if the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _remove_stale(target: Path) -> None:
    """Remove what killed writers of the same target left; a living process's partial folder is never touched."""
    prefix = f".{target.name}.partial-"
    for entry in os.scandir(target.parent):
        if entry.name.startswith(prefix):
            pid = entry.name[len(prefix) :].split("-")[0]
            if pid.isdigit() and not is_running(int(pid)):
                _remove(Path(entry.path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return  # the fault that brought us here is the one to report


def _make_parents(folder: Path) -> None:
    """Create missing parents, and sync each new entry to disk."""
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise ConflictError(f"{folder} is a file, and a folder is needed there", hint="choose another place")
    _make_parents(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for file in files:
            path = os.path.join(root, file)
            if not os.path.islink(path):
                _sync(path)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    try:
        _sync(str(folder))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):  # not every file system can sync folders
            raise


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """Return the bytes written so far under a partial name."""
    if path.is_dir():
        return sum(os.path.getsize(os.path.join(root, file)) for root, _, files in os.walk(path) for file in files)
    return path.stat().st_size if path.exists() else 0
