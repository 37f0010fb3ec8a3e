"""The errors that graftwerk raises, as one tree; the exit code of a command is that of its error.

    GraftwerkError (1)
      ConfigError (2)     DataError (3)
      ModelError (4)      UnsupportedError, AdapterError
      ResourceError (5)   MemoryShortage
      DivergedError (6)   ConflictError (7)   IntegrityError (8)   ForgettingError (9)
    RunInterrupted (130 for SIGINT, 143 for SIGTERM), which is no `Exception`

A message says what happened and, if known, where (file:line, config key, module path), a hint what to change, and what
was recovered. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

from graftwerk.sanitize import clean


class ErrorReport(BaseException):
    """Base of `GraftwerkError` and `RunInterrupted`: a message in four parts.

    ``str(error)`` is the whole message; ``error.as_dict()`` is the same for programs. Both are cleaned
    (`sanitize.clean`), since they may quote foreign names and paths.

    Args:
        what: What happened, in the user's terms, with the offending value.
        where: A file with its line, a config key, or a module path.
        hint: What to change so that it works.
        recovered: What is still good on disk, and where.

    Example:
        >>> print(DataError("no label", where="reviews.csv:7", hint="fill the column `label`"))
        no label
          where: reviews.csv:7
          hint: fill the column `label`
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, recovered: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.recovered = what, where, hint, recovered

    def __str__(self) -> str:
        parts = [self.what]
        for label, text in (("where", self.where), ("hint", self.hint), ("recovered", self.recovered)):
            if text:
                parts.append(f"  {label}: {text}")
        return clean("\n".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, vars(self))

    def as_dict(self) -> dict[str, Any]:
        """Return code, exit code and the four parts, under their names of earlier versions too."""
        parts = {"what": self.what, "where": self.where, "hint": self.hint, "recovered": self.recovered}
        parts |= {old: parts[new] for old, new in _RENAMED_PARTS.items()}
        return {
            "error": self.code,
            "exit_code": self.exit_code,
            **{name: None if text is None else clean(text) for name, text in parts.items()},
        }

    # -- names of earlier versions -------------------------------------------------------------------------------------

    @property
    def mend(self) -> str | None:
        """Return `hint` by its earlier name; deprecated."""
        return self._renamed("mend")

    @property
    def kept(self) -> str | None:
        """Return `recovered` by its earlier name; deprecated."""
        return self._renamed("kept")

    def _renamed(self, name: str) -> str | None:
        warnings.warn(f"`{name}` is now called `{_RENAMED_PARTS[name]}`", DeprecationWarning, stacklevel=3)
        part: str | None = getattr(self, _RENAMED_PARTS[name])
        return part


class GraftwerkError(ErrorReport, Exception):
    """Base class of every error that graftwerk raises on purpose; raised itself, it reports a defect."""


class ConfigError(GraftwerkError):
    """A key, value, file or argument from the user is wrong."""

    code = "config"
    exit_code = 2


class DataError(GraftwerkError):
    """Rows cannot be read, or nothing can be learned from them."""

    code = "data"
    exit_code = 3


class ModelError(GraftwerkError):
    """The model does not fit the task, the method or the data (architecture, vocabulary, head)."""

    code = "model"
    exit_code = 4


class UnsupportedError(ModelError):
    """The model does not support the requested method, task or operation."""

    code = "unsupported"


class AdapterError(ModelError):
    """A stored adapter does not match the model: missing, unexpected or misshapen tensors, or another base."""

    code = "adapter"


class ResourceError(GraftwerkError):
    """Disk, memory, permissions, network or a package is missing. ``code`` stays "environment", its name in 0.1.0."""

    code = "environment"
    exit_code = 5


class MemoryShortage(ResourceError):  # noqa: N818
    """A training does not fit into memory; another method, or smaller batches, may."""

    code = "memory"


class DivergedError(GraftwerkError):
    """Loss or gradients stopped being finite."""

    code = "diverged"
    exit_code = 6


class ConflictError(GraftwerkError):
    """A resource is in use or a name is taken: a locked run folder, an adapter of that name."""

    code = "conflict"
    exit_code = 7


class IntegrityError(GraftwerkError):
    """A file is damaged, hostile, or not what its name says."""

    code = "integrity"
    exit_code = 8


class ForgettingError(GraftwerkError):
    """A run has lost more of what it was to retain than its settings allow; it is finished and stays where it is."""

    code = "forgetting"
    exit_code = 9


class RunInterrupted(ErrorReport):
    """SIGINT or SIGTERM stopped the run; `recovered` names the newest checkpoint, if there is one.

    Derives from BaseException, as KeyboardInterrupt does, so that no ``except Exception`` swallows a stop or turns it
    into another error. ``exit_code`` is 128 + the signal's number.
    """

    code = "interrupted"

    def __init__(self, signum: int, what: str, *, recovered: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, recovered=recovered, hint=hint)
        self.signum = signum

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """Return 128 plus the signal's number, as a shell does."""
        return 128 + self.signum


def did_you_mean(wrong: str, known: Iterable[str], then: str = "") -> str:
    """Return a suggestion of the most similar known name, if there is one, followed by the sentence ``then``.

    Example:
        >>> from graftwerk.errors import did_you_mean
        >>> did_you_mean("lroa", ["lora", "ia3"], "There are: lora, ia3")
        'did you mean `lora`? There are: lora, ia3'
        >>> did_you_mean("full", ["lora", "ia3"])
        ''
    """
    named = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(wrong.casefold(), list(named), n=1, cutoff=0.6)
    return " ".join(filter(None, [f"did you mean `{named[near[0]]}`?" if near else "", then]))


def _rebuild(cls: type[ErrorReport], args: tuple[Any, ...], values: dict[str, Any]) -> ErrorReport:
    """Return an error as it was pickled; its parts are no positional arguments."""
    error = cls.__new__(cls, *args)
    vars(error).update(values)
    return error


_RENAMED = {
    "EnvironmentFault": "ResourceError",
    "Interrupted": "RunInterrupted",
    "Explained": "ErrorReport",
}
"""Names of earlier versions that still work for one release, each with its name today."""
_RENAMED_PARTS = {"mend": "hint", "kept": "recovered"}
"""The same for attributes of an error and keys of its JSON."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module 'graftwerk.errors' has no attribute {name!r}")
    warnings.warn(f"`{name}` is now called `{_RENAMED[name]}`", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
