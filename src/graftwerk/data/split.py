"""Rows held out for validation and test: drawn by what a row says, not by where it stands.

Every row gets a place in an order that depends on its text and the split seed, so the same rows are drawn on every
machine and whatever the file's order, and adding rows to a file hardly moves the others. Rows with the same text (apart
from white space and case) stay together, so that no held-out row was also learnt from. The order alternates between the
classes in proportion to their sizes: every prefix of it is stratified.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from graftwerk.errors import ConfigError, DataError


def fold(text: str) -> str:
    """Return a text for comparison of rows: white space collapsed, case folded."""
    return " ".join(text.split()).casefold()


def held_out(amount: int | float | None, rows: int, key: str) -> int:
    """Return the number of rows to hold out for a setting like 500 or 0.1; a share gives at least one row.

    Args:
        amount: A number of rows, a share (0 to 1), or None for no rows.
        rows: Number of rows there are.
        key: Name of the setting, for messages.

    Raises:
        ConfigError: No row would be left to train on.
    """
    if amount is None:
        return 0
    count = amount if isinstance(amount, int) else max(1, round(amount * rows))
    if count >= rows:
        raise ConfigError(
            f"`{key}: {amount}` holds out {count:,} of {rows:,} rows; none would be left to learn from",
            where=key,
            hint="hold out fewer rows, or give more data",
        )
    return count


def draw_order(texts: Sequence[str], classes: Sequence[str] | None, split_seed: int) -> list[list[int]]:
    """Return groups of row indices (rows of the same folded text) in the order in which they are drawn.

    Args:
        texts: One text a row.
        classes: One class per row, between which the order alternates, or None.
        split_seed: Another seed, another order.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        groups[fold(text)].append(index)
    strata: dict[str, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for folded, members in groups.items():
        # The least of the classes: it must not depend on the file's order where the same text has two.
        stratum = "" if classes is None else min(classes[index] for index in members)
        strata[stratum].append((_digest(split_seed, folded), members))
    ranked: list[tuple[float, bytes, list[int]]] = []
    for members_of in strata.values():
        members_of.sort(key=lambda pair: pair[0])
        size = sum(len(members) for _, members in members_of)
        before = 0
        for digest, members in members_of:
            ranked.append(((before + len(members) / 2) / size, digest, members))
            before += len(members)
    ranked.sort(key=lambda entry: entry[:2])
    return [members for _, _, members in ranked]


def _digest(seed: int, text: str) -> bytes:
    # surrogates are refused before; "surrogatepass" keeps this total for callers with their own rows
    return hashlib.blake2b(f"{seed}\n{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_rows(
    texts: Sequence[str],
    classes: Sequence[str] | None,
    *,
    test: int = 0,
    validation: int = 0,
    max_train: int | None = None,
    split_seed: int = 0,
    train_seed: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Split rows; return the indices for training, validation and test, each in the order of the file.

    Test rows are drawn first, then validation, then training, each from where the one before stopped: the test rows do
    not depend on how much validation there is, and fewer training rows are a part of more training rows.

    Args:
        texts: One text a row.
        classes: One class per row, or None.
        test: Number of test rows.
        validation: Number of validation rows.
        max_train: Largest number of training rows, or None for all that are left.
        split_seed: Another seed, another split.
        train_seed: Seed of the draw of validation and training rows after the test rows, or None for ``split_seed``.

    Raises:
        DataError: repeated texts leave no way to hold out so many rows, or nothing is left to learn from.
    """
    remaining = draw_order(texts, classes, split_seed)
    drawn: dict[str, list[int]] = {}
    for name, count in (("test", test), ("validation", validation)):
        drawn[name], remaining = _take(remaining, count)
        if name == "test" and train_seed is not None:
            left_over = {group[0] for group in remaining}
            remaining = [group for group in draw_order(texts, classes, train_seed) if group[0] in left_over]
        if count and not drawn[name]:
            raise DataError(
                f"no {name} rows can be held out: every text that is left stands in more than {count:,} rows",
                hint="remove repeated rows, or hold out more",
            )
    left = sum(len(group) for group in remaining)
    train, _ = _take(remaining, left if max_train is None else min(max_train, left))
    if not train:
        raise DataError(
            "no rows are left to learn from after holding out",
            hint="hold out fewer rows, or give more data (rows with the same text stay on one side)",
        )
    return sorted(train), sorted(drawn["validation"]), sorted(drawn["test"])


def _take(groups: list[list[int]], count: int) -> tuple[list[int], list[list[int]]]:
    """Return the first ``count`` rows in whole groups, as many as fit, and the groups not taken."""
    taken: list[int] = []
    passed: list[list[int]] = []
    for at, group in enumerate(groups):
        if len(taken) == count:
            return taken, passed + groups[at:]
        if len(taken) + len(group) <= count:
            taken.extend(group)
        else:
            passed.append(group)
    return taken, passed
