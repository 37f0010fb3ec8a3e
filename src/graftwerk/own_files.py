"""Files of ours, which lie where we put them.

A folder that the user names may be a link, or lie behind one: that is the user's choice. What lies inside of it was
made by us, so a symbolic link there was put there by somebody else, and who writes through it overwrites any file that
the user may write. It is refused wherever it leads; so is a pipe or a device, and, for files that are written in place,
a second name (a hard link).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from graftwerk.errors import IntegrityError


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links, pipes and devices under names of ours, and everywhere below those that are folders.

    Args:
        folder: May itself be a link.
        names: Entries of the folder; missing ones are passed over.

    Raises:
        IntegrityError: there is one; it is named, and where it leads.
    """
    for name in names:
        refuse_link(folder / name)
        for root, folders, files in os.walk(folder / name):
            for entry in (*folders, *files):
                refuse_link(Path(root, entry))


def refuse_link(path: Path) -> None:
    """Raise IntegrityError where a path is neither free nor a file or folder of its own."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing there, or nothing that could be opened either
        return
    if stat.S_ISLNK(mode):
        _refuse(path, f"is a symbolic link to {os.readlink(path)}")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        _refuse(path, "is a pipe, a socket or a device")


def open_own(path: Path, flags: int) -> int:
    """Open a file of ours that is written in place, never through a link.

    Args:
        path: The file.
        flags: As for `os.open`. Without O_TRUNC: nothing may be cut off before it is known whose file it is.

    Returns:
        The descriptor.

    Raises:
        IntegrityError: it is a symbolic link, no regular file, or has a second name.
        OSError: as `os.open`.
    """
    # Not blocking, so that a pipe put in the place of a file cannot hold us up.
    extra = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    refuse_link(path)
    try:
        descriptor = os.open(path, flags | extra, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            _refuse(path, "is a symbolic link")
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            _refuse(path, "is no regular file")
        if found.st_nlink > 1:
            _refuse(path, "has a second name (a hard link), under which it would change too")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse(path: Path, what: str) -> NoReturn:
    raise IntegrityError(
        f"{path} {what}; files of a run are never read or written through one",
        where=str(path),
        hint="remove it, or put the file itself in its place; the run folder as a whole may be a link",
    )
