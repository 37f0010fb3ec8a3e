"""The one switch of all fast paths: each gives what its plain path gives, and turning it off changes the time alone.

Tests and benchmarks compare the two; ``GRAFTWERK_PLAIN=1`` in the environment turns all of them off for a whole
process, when somebody wants to know whether one is to blame. (``GRAFTWERK_PLAIN=fused,trunk``: these alone.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from graftwerk.errors import ConfigError

Path = Literal["fused", "lean", "loss", "prepared", "rows", "trunk"]
"""``fused``: a linear layer and its adapters in one autograd node. ``lean``: frozen norms and activation functions that
keep nothing that can be computed again. ``loss``: the vocabulary head in blocks. ``prepared``: rows that an earlier
start read and encoded. ``rows``: gathered products where rows of a batch have different adapters. ``trunk``: hidden
states below the lowest adapted layer are kept."""

PATHS: tuple[Path, ...] = get_args(Path)


def _from_environment(value: str) -> frozenset[str]:
    words = {word.strip() for word in value.split(",") if word.strip()}
    if words <= {"0"}:
        return frozenset()
    if "1" in words:
        return frozenset(PATHS)
    if unknown := sorted(words - {*PATHS}):
        raise ConfigError(
            f"there is no fast path `{unknown[0]}`", where="GRAFTWERK_PLAIN", hint=f"1 for all, or: {', '.join(PATHS)}"
        )
    return frozenset(words)


_off = _from_environment(os.environ.get("GRAFTWERK_PLAIN", ""))


def enabled(path: Path) -> bool:
    """Whether a fast path may be taken."""
    return path not in _off


@contextmanager
def plain(*paths: Path) -> Iterator[None]:
    """The plain way inside the block: for the paths that are named, or for all. Not for several threads at once."""
    global _off
    before = _off
    _off = before | frozenset(paths or PATHS)
    try:
        yield
    finally:
        _off = before
