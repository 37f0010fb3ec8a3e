"""Places that a run file names, turned into paths: plain ones, and `pkg://package/inner/path` in installed packages."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import io
import os
import stat
from pathlib import Path

from graftwerk.errors import ConfigError, ResourceError
from graftwerk.sanitize import REDACTED

PACKAGE_SCHEME = "pkg://"


def locate(place: str | Path) -> Path:
    """Return the existing file or folder that a ``pkg://`` address or a path names.

    A package is found without being imported, so none of its code runs, and nothing outside its folder can be named.

    Args:
        place: ``pkg://package/inner/path``, or a path (``~`` is the home folder).

    Raises:
        ConfigError: There is no such file; the message has the exact path and the most similar name beside it.
        ResourceError: The package is not installed.
    """
    text = str(place)
    if "\0" in text:
        raise ConfigError(f"a path cannot hold a NUL character: {text!r}")
    if REDACTED in text:
        raise ConfigError(
            f"the secret in {text} was left out when the run was written, and is not known here",
            where=text,
            hint="pass the path or URL again: data.train=..., --data, model=... or --model",
        )
    try:
        path = _in_package(text) if text.startswith(PACKAGE_SCHEME) else Path(text).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, half a character, nobody's home
        raise ConfigError(f"{text[:200]!r} cannot be a path: {getattr(error, 'strerror', None) or error}") from None
    if exists and not (path.is_file() or path.is_dir()):
        raise ConfigError(
            f"{path} is a pipe, a device or a socket; only regular files are read",
            where=text if text != str(path) else None,
            hint="write its content into a file first",
        )
    if not exists and "://" in text and not text.startswith(PACKAGE_SCHEME):
        raise ConfigError(f"{text} is not read over the network", hint="download it first, and name the file")
    if not exists:
        raise ConfigError(
            f"there is no file or folder {path}", where=text if text != str(path) else None, hint=_near(path)
        )
    return path


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading; what would block or never end (a pipe, a device, a socket) is not opened.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, or its name holds a NUL.
    """
    # Not blocking, so that a pipe put in the place of a file cannot hold us up.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        stream = io.FileIO(os.open(path, flags))
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket, or a device that is not there
            raise
        raise ValueError("it is no regular file") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError("it is no regular file")
    return stream


def _in_package(text: str) -> Path:
    package, _, inner = text.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier():
        raise ConfigError(f"`{package}` is no package name", where=text, hint="write pkg://package/path/inside")
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise ResourceError(
            f"the package `{package}` is not installed here",
            where=text,
            hint=f"pip install {package.replace('_', '-')}",
        )
    root = Path(roots[0]).resolve()
    path = root / inner
    # Compared as resolved parts, not as text: `package-evil` is not inside `package`, and a link may lead outside.
    if not path.resolve().is_relative_to(root):
        raise ConfigError(f"`{inner}` leads outside the package `{package}`", where=text)
    return path


def _near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"{parent} holds: {', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}"
