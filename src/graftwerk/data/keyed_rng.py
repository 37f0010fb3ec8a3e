"""Random numbers that belong to a text, not to its place in a file.

What happens to a row follows from the seed, the augmenter, the row's own text and the number of the variant. So a
file in another order, or in other batches, or made in two halves with a kill between them, gives the same rows.
"""

from __future__ import annotations

import hashlib
import json
import random


def chance(*key: str | int) -> random.Random:
    """Return a generator of uniform numbers for a key, the same on every machine and in every version of Python.

    Only ``random()`` of it is to be used: Python promises its sequence for a seed, of no other method.
    """
    return random.Random(int.from_bytes(_digest(key, 16)))


def fingerprint(*key: str | int) -> str:
    """Return a hash of one text, or of several in order, as 32 hexadecimal digits."""
    return _digest(key, 16).hex()


def _digest(key: tuple[str | int, ...], size: int) -> bytes:
    # JSON keeps ("ab", "c") and ("a", "bc") apart, and writes half a surrogate pair without raising.
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=size).digest()
