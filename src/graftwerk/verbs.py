"""`graftwerk.train(...)`, `graftwerk.evaluate(...)`, `graftwerk.augment(...)`: verbs that are also names of rooms.

Python binds a package's name on its parent when anything inside it is imported, so a function of the same name there
would work or not depending on what was imported before. The packages themselves can therefore be called.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A package that can be called; the call goes to the function of the same name in its module `run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(import_module(f"{self.__name__}.run"), self.__name__.rpartition(".")[2])


def make_callable(package: str) -> None:
    """Let a package be called, as ``package.run.<package's own name>``."""
    sys.modules[package].__class__ = Verb
