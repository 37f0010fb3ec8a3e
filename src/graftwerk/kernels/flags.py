"""The switch of all kernels and fast paths: each equals its plain path, and turning it off changes only the time.

One exception: with dropout, ``first`` draws masks for one token, so that a seed gives others.

Tests and benchmarks compare the two; ``GRAFTWERK_PLAIN=1`` in the environment turns all of them off for a whole
process, to find out whether one is to blame for a problem. (``GRAFTWERK_PLAIN=fused,trunk``: these alone.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from graftwerk.errors import ConfigError

Path = Literal["first", "fused", "lean", "loss", "prepared", "rows", "trunk"]
"""``first``: the last layer at the first token alone, if the head reads no other. ``fused``: a linear layer and its
adapters in one autograd node. ``lean``: frozen norms and activation functions that store nothing that backward can
recompute. ``loss``: cross-entropy in tiles. ``prepared``: the cache of encoded rows. ``rows``: batched products for
batches whose rows have different adapters. ``trunk``: the cache of hidden states below the lowest adapted layer."""

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
    """Return True if a fast path may be taken.

    Example:
        >>> with plain("fused"):
        ...     enabled("fused"), enabled("lean")
        (False, True)
    """
    return path not in _off


@contextmanager
def plain(*paths: Path) -> Iterator[None]:
    """Take the plain path inside the block, for the given paths or for all.

    The switch belongs to the process: do not use it in several threads at once.
    """
    global _off
    before = _off
    _off = before | frozenset(paths or PATHS)
    try:
        yield
    finally:
        _off = before
