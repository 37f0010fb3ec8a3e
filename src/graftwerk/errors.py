"""One rooted tree of errors, written for the person who has to put things right; and `RunInterrupted`.

Every error says *what* happened, *where* (file:line, config key, module path), a *hint* how to put it right, and what
was *recovered*.
The exit code of a command is the exit code of its error; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

from graftwerk.sanitize import clean


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return ``did you mean `right`? ``, with a trailing space, or "" if no known name is similar."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`? " if near else ""


class Explained(BaseException):
    """Base of `GraftwerkError` and `RunInterrupted`: a message in four parts.

    ``str(error)`` is the whole message; ``error.as_dict()`` is the same for programs. Both are cleaned
    (`sanitize.clean`): foreign names and places may stand in them.

    Args:
        what: What happened, in the user's terms, with the offending value.
        where: A file with its line, a config key, or a module path.
        hint: What to change so that it works.
        recovered: What is still good on disk, and where.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, recovered: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.recovered = what, where, hint, recovered

    @property
    def mend(self) -> str | None:
        """Return `hint`, under its name of 0.1.0."""
        return self.hint

    @property
    def kept(self) -> str | None:
        """Return `recovered`, under its name of 0.1.0."""
        return self.recovered

    def __str__(self) -> str:
        parts = [self.what]
        for label, text in (("where", self.where), ("hint", self.hint), ("recovered", self.recovered)):
            if text:
                parts.append(f"  {label}: {text}")
        return clean("\n".join(parts))

    def as_dict(self) -> dict[str, Any]:
        """Return the error as the object that `--json` prints, without control characters."""
        said = {"what": self.what, "where": self.where, "hint": self.hint, "recovered": self.recovered}
        said |= {"mend": self.hint, "kept": self.recovered}  # the names of 0.1.0
        return {
            "error": self.code,
            "exit_code": self.exit_code,
            **{name: None if text is None else clean(text) for name, text in said.items()},
        }


class GraftwerkError(Explained, Exception):
    """The root of everything that can be wrong."""


class ConfigError(GraftwerkError):
    """A wrong key, value, file or argument given by the user."""

    code = "config"
    exit_code = 2


class DataError(GraftwerkError):
    """Rows that cannot be read, or that could not be learnt from."""

    code = "data"
    exit_code = 3


class ModelError(GraftwerkError):
    """The model and what is asked of it do not fit (architecture, vocabulary, head)."""

    code = "model"
    exit_code = 4


class UnsupportedError(ModelError):
    """A method cannot do this on this model; the message says which can."""

    code = "unsupported"


class AdapterError(ModelError):
    """An adapter folder and this model do not fit: missing, extra or mis-shaped weights, another base."""

    code = "adapter"


class ResourceError(GraftwerkError):
    """Disk, memory, permission, network, or a package that is not installed."""

    code = "environment"
    exit_code = 5


class DivergedError(GraftwerkError):
    """Loss or gradients stopped being finite."""

    code = "diverged"
    exit_code = 6


class ConflictError(GraftwerkError):
    """Somebody else holds what is wanted: a locked run folder, a name in use."""

    code = "conflict"
    exit_code = 7


class IntegrityError(GraftwerkError):
    """A file is damaged, hostile, or not what its name says."""

    code = "integrity"
    exit_code = 8


class RunInterrupted(Explained):
    """SIGINT or SIGTERM, raised after a verified save. ``exit_code`` is 128 + the signal's number.

    Like KeyboardInterrupt it is no `Exception`: nobody's ``except Exception`` takes a stop for a fault of what it
    guards, and so turns it into another error or goes on as if nothing had come.
    """

    code = "interrupted"

    def __init__(self, signum: int, what: str, *, recovered: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, recovered=recovered, hint=hint)
        self.signum = signum

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """Return 128 plus the signal's number, as a shell does."""
        return 128 + self.signum


_RENAMED = {"EnvironmentFault": "ResourceError", "Interrupted": "RunInterrupted"}
"""Names of 0.1.0 that still work, each with its name today."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module 'graftwerk.errors' has no attribute {name!r}")
    warnings.warn(f"`{name}` is now called `{_RENAMED[name]}`", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
