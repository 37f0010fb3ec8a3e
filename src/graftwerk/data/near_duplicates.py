"""Held-out rows that are nearly training rows: most of their words in the same order.

Two texts are compared by their shingles, runs of three words: near is a Jaccard similarity (shared shingles over all
of both) of at least `NEAR`. Nothing is estimated. A text that similar to a held-out one of n shingles shares at least
ceil(NEAR * n) of them, hence one of any n - ceil(NEAR * n) + 1: only so many, the rarest, are looked up for each
held-out row, and every candidate is then counted out (prefix filtering; Chaudhuri et al., ICDE 2006). The training rows
are gone through once.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from graftwerk.data.checks import PlacedRows
from graftwerk.data.findings import Issue

NEAR = 0.7
SHINGLE = 3
"""Words of a shingle."""
FEWEST = 3
"""A text with fewer shingles is too short for a word more or less to tell anything."""
MOST_LISTED = 100
"""Held-out rows that are looked up for one shingle: hundreds of rows from one template would be compared each with
each, and are found by their first ones."""
_WORD = re.compile(r"\w+")


def check_near_leakage(splits: Mapping[str, PlacedRows]) -> tuple[Issue, ...]:
    """Report held-out rows similar to a training row, without exact duplicates (white space and case aside)."""
    train = splits.get("train")
    if train is None or not train.texts:
        return ()
    return tuple(found for name, rows in splits.items() if name != "train" for found in _near(name, rows, train))


def shingles(text: str) -> frozenset[str]:
    """Return the shingles of three words; letters and digits count, case and punctuation do not."""
    words = _WORD.findall(text.casefold())
    return frozenset(" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1))


def _near(name: str, rows: PlacedRows, train: PlacedRows) -> list[Issue]:
    same = set(train.folded)
    held = {at: shingles(text) for at, text in enumerate(rows.folded) if text not in same}
    held = {at: its for at, its in held.items() if len(its) >= FEWEST}
    frequent = Counter(shingle for its in held.values() for shingle in its)
    listed: dict[str, list[int]] = defaultdict(list)
    for at, its in held.items():
        looked_up = len(its) - math.ceil(NEAR * len(its)) + 1
        for shingle in sorted(its, key=lambda shingle: (frequent[shingle], shingle))[:looked_up]:
            if len(listed[shingle]) < MOST_LISTED:
                listed[shingle].append(at)
    found: dict[int, tuple[float, int]] = {}
    for at, text in enumerate(train.folded):
        if not listed:
            break
        its = shingles(text)
        for candidate in {other for shingle in its if shingle in listed for other in listed[shingle]}:
            alike = len(its & held[candidate]) / len(its | held[candidate])
            if alike >= max(NEAR, found.get(candidate, (0.0, 0))[0] + 1e-9):
                found[candidate] = (alike, at)
    if not found:
        return []
    first = min(found)
    alike, at = found[first]
    return [
        Issue(
            "near-leakage",
            f"{len(found):,} of {len(rows.texts):,} {name} rows are nearly the same as a training row",
            len(found),
            example=f"{train.show(at)} and {rows.show(first)} ({alike:.0%} of their word triples)",
            hint=f"remove them from one side, if they are the same thing twice; metrics on the {name} rows may be "
            "better than the truth",
        )
    ]
