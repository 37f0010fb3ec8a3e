"""Checks of labelled text before a model is loaded: what makes a run worthless stops it, what misleads is counted."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import combinations
from typing import Any

from graftwerk.data.findings import Issue
from graftwerk.data.split import fold
from graftwerk.errors import AdapterError, DataError

SKEWED, HOPELESS = 0.9, 0.99
"""Shares of one class that are worth saying, and that leave too few others to learn from."""
MANY_CLASSES, FEW_ROWS = 50, 5
"""From so many classes on, fewer rows for each on average are worth saying."""
MOST_SCORES = 10
"""Classes whose names are numbers with a fraction are scores if there are more."""
NOTHING = frozenset(
    "nan -nan null nil <na> #n/a #na n/a <null> <nan> 1.#ind -1.#ind 1.#qnan -1.#qnan undefined".split()  # noqa: SIM905
)
"""What programs write, in any case, for an empty cell."""
PERHAPS_NOTHING = frozenset({"none", "na"})
"""The same, but they may also be meant: no stance, Namibia."""
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,39})(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?", re.ASCII)


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the classes in the order of their ids: by number if all are whole numbers, else by code point."""
    names = set(labels)
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_labels(
    used: Mapping[str, Sequence[str] | Mapping[str, int]], known: Sequence[str] | None, source: str
) -> tuple[tuple[str, ...], tuple[Issue, ...]]:
    """Return the label names of a run, and issues with them.

    Args:
        used: The labels of the rows of each split (``train``, ``validation``, ``test``), or the number of rows of each.
        known: The names that an adapter already has, which stay in their order, or None.
        source: For messages.

    Raises:
        DataError: There is one class only, or validation or test have classes that training lacks.
        AdapterError: The rows have classes that the adapter lacks.
    """
    counts = {split: Counter(labels) for split, labels in used.items()}
    if known is not None:
        for split, labels in counts.items():
            extra = sorted(set(labels) - set(known))
            if extra:
                raise AdapterError(
                    f"the {split} rows have {_classes(extra)} that the adapter was not trained for",
                    where=f"rows: {listed(label_names(list(labels)))}; adapter: {listed(known)}",
                    hint="use rows with the adapter's classes, or train a new adapter",
                )
        return tuple(known), _absent_classes(counts, known)
    train = counts["train"]
    names = label_names(list(train))
    if len(names) < 2:
        raise DataError(
            f"all {train.total():,} training rows of {source} have the one class {names[0]!r};"
            " there is nothing to tell apart",
            hint="check `data.columns.label` and `data.filter`, or add rows of other classes",
        )
    for split, labels in counts.items():
        extra = sorted(set(labels) - set(names))
        if extra:
            raise DataError(
                f"the {split} rows have {_classes(extra)} that no training row has",
                where=f"train: {listed(names)}; {split}: {listed(label_names(list(labels)))}",
                hint=other_task(train) or "give both the same classes (spelling and case count), or remove those rows",
            )
    said = spellings(names) + _missing(train) + _many(train) + _single_rows(train) + _skew(train)
    return names, said + _absent_classes(counts, names)


def _missing(labels: Counter[str]) -> tuple[Issue, ...]:
    """Report empty cells that a program wrote out as text: they would be learnt as a class."""
    found = {name: count for name, count in labels.items() if name.casefold() in NOTHING | PERHAPS_NOTHING}
    if not found:
        return ()
    listed = ", ".join(f"{name!r} ({count:,} rows)" for name, count in sorted(found.items()))
    return (
        Issue(
            "missing-values",
            f"classes of the training rows read like empty cells: {listed}",
            sum(found.values()),
            hint="leave these rows out, or give them their class",
            grave=any(name.casefold() in NOTHING for name in found),
        ),
    )


def missing_in(row: Mapping[str, Any], label: str | None) -> Iterator[str]:
    """Yield the texts of a row, those of its turns too, that read like an empty cell; but not its class."""
    for part, value in row.items():
        texts = [value] if isinstance(value, str) else [turn[1] for turn in value] if part == "turns" else ()
        for text in texts if part != label else ():
            if len(text) < 12 and text.strip().casefold() in NOTHING:
                yield text.strip()


def missing_texts(split: str, found: Counter[str], rows: int) -> tuple[Issue, ...]:
    """Say how many texts of a split's ``rows`` are what `missing_in` found."""
    if not found:
        return ()
    listed = ", ".join(f"{text!r} ({count:,} times)" for text, count in found.most_common(5))
    message = f"texts of the {rows:,} {split} rows read like empty cells: {listed}"
    return (Issue("missing-values", message, found.total(), hint="leave these rows out, or give their text"),)


def other_task(labels: Counter[str]) -> str | None:
    """Return what leads to the task that the answers look to be of, or None if they look like classes."""
    lists = [name for name in labels if name.startswith("[") and name.endswith("]")]
    if 2 * len(lists) > len(labels):
        return "this looks like several labels a row: task=multilabel, columns: {labels: ...}"
    if len(labels) <= MOST_SCORES or not all(_NUMBER.fullmatch(name) for name in labels):
        return None
    if len(labels) < MANY_CLASSES and all(_INTEGER.fullmatch(_spelt(name)) for name in labels):
        return None  # numbered classes are nothing rare
    return "this looks like regression: task=regression, columns: {score: ...}"


def _many(labels: Counter[str]) -> tuple[Issue, ...]:
    """Return issues of labels that look like scores or lists, or of more classes than the rows can teach."""
    rows, other = labels.total(), other_task(labels)
    if other is not None and "multilabel" in other:
        said = f"{next(name for name in labels if name.startswith('['))!r:.60} is a list, and is learnt"
        return (Issue("many-classes", f"{said} as a class of its own", rows, hint=other, grave=True),)
    fractions = [name for name in labels if _NUMBER.fullmatch(name) and not _INTEGER.fullmatch(_spelt(name))]
    if fractions and all(_NUMBER.fullmatch(name) for name in labels):
        said = f"all {len(labels):,} classes are numbers, {fractions[0]} among them, as scores are: each is learnt"
        hint = f"{other or 'if they are amounts: task=regression'}; or round them to a few classes"
        return (
            Issue("many-classes", f"{said} as a class of its own", rows, hint=hint, grave=len(labels) > MOST_SCORES),
        )
    if len(labels) < MANY_CLASSES or rows >= FEW_ROWS * len(labels):
        return ()
    message = f"there are {len(labels):,} classes and {rows:,} training rows: {rows / len(labels):.1f} for each"
    hint = "; or ".join(filter(None, [other, "give more rows, or put classes together"]))
    return (Issue("many-classes", message, rows, hint=hint),)


def _skew(labels: Counter[str]) -> tuple[Issue, ...]:
    """Return an issue if one class dominates: always predicting it scores high, and nothing is learnt."""
    (most, count), *_ = labels.most_common(1)
    rows = labels.total()
    share = count / rows
    if share < SKEWED:
        return ()
    message = f"{share:.1%} of the {rows:,} training rows have the class {most!r}: a model that always says so"
    return (
        Issue(
            "label-skew",
            f"{message} is right as often",
            rows - count,
            example=f"{rows - count:,} rows have another class",
            hint="give more rows of the other classes; look at f1_macro, not at accuracy",
            grave=share >= HOPELESS,
        ),
    )


def spellings(names: Sequence[str]) -> tuple[Issue, ...]:
    """Return an issue if some names differ only in how they are written."""
    folded: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded[_spelt(name)].append(name)
    alike = [group for group in folded.values() if len(group) > 1]
    if not alike:
        return ()
    shown = ", ".join(repr(name) for name in alike[0])
    message = f"classes differ only in how they are written: {shown}; they are learnt as different classes"
    return (Issue("label-spelling", message, 0, example=shown, hint="spell each class in one way", grave=True),)


def _spelt(name: str) -> str:
    """Return a class name without mere spelling: case, white space, Unicode form, and how a number is written."""
    visible = (character for character in name if unicodedata.category(character) != "Cf")
    text = fold(unicodedata.normalize("NFC", "".join(visible)))
    return f"{Decimal(text).normalize() + 0:f}" if _NUMBER.fullmatch(text) else text


def _single_rows(labels: Counter[str]) -> tuple[Issue, ...]:
    rare = sorted(name for name, count in labels.items() if count == 1)
    if not rare:
        return ()
    every = len(rare) * 2 > labels.total()
    return (
        Issue(
            "rare-classes",
            f"{len(rare):,} of {len(labels):,} classes have a single training row",
            len(rare),
            example=listed(rare),
            hint="is `data.columns.label` the right column?"
            if every
            else "add rows of these classes, or leave them out",
            grave=every,
        ),
    )


def _absent_classes(used: Mapping[str, Counter[str]], names: Sequence[str]) -> tuple[Issue, ...]:
    findings = []
    for split, labels in used.items():
        absent = [name for name in names if name not in labels] if labels else []
        if absent:
            message = f"the {split} rows have none of {_classes(absent)}: no metric will say anything about them"
            findings.append(Issue("absent-classes", message, 0, example=listed(absent), hint=f"use more {split} rows"))
    return tuple(findings)


@dataclass(frozen=True)
class PlacedRows:
    """The rows of one split, with the place of each.

    Attributes:
        texts: The text of each row.
        labels: The class of each row, or None if rows have no class.
        where: Function from a row's index to its place (`file:line`).
    """

    texts: Sequence[str]
    labels: Sequence[str] | None
    where: Callable[[int], str]

    @cached_property
    def folded(self) -> list[str]:
        """Return the texts in the form in which they are compared."""
        return [fold(text) for text in self.texts]

    def show(self, index: int) -> str:
        """Return place and beginning of a row, for a message."""
        return f"{self.where(index)}: {_short(self.texts[index])}"


def check_duplicates(splits: Mapping[str, PlacedRows]) -> tuple[Issue, ...]:
    """Report duplicate rows, within a split or across splits; white space and case do not count."""
    findings: list[Issue] = []
    for name, rows in splits.items():
        findings += _inside(name, rows)
    for first, second in combinations(splits, 2):
        findings += _across(first, splits[first], second, splits[second])
    return tuple(findings)


def _inside(split: str, rows: PlacedRows) -> list[Issue]:
    classes: dict[str, set[str]] = defaultdict(set)
    first: dict[str, int] = {}
    repeated: list[int] = []
    exact = 0
    seen: set[str] = set()
    for index, key in enumerate(rows.folded):
        if rows.labels is not None:
            classes[key].add(rows.labels[index])
        if key in first:
            repeated.append(index)
            exact += rows.texts[index] in seen
        else:
            first[key] = index
        seen.add(rows.texts[index])
    findings = []
    count = len(rows.texts)
    if repeated:
        example = f"{rows.where(first[rows.folded[repeated[0]]])} and {rows.show(repeated[0])}"
        message = f"{len(repeated):,} of {count:,} {split} rows repeat another row's text ({exact:,} to the letter)"
        findings.append(Issue("duplicates", message, len(repeated), example=example, hint="remove the repeats"))
    torn = [key for key, names in classes.items() if len(names) > 1]
    if torn:
        held = sum(1 for key in rows.folded if len(classes[key]) > 1)
        example = f"{rows.show(first[torn[0]])} is {' and '.join(sorted(classes[torn[0]]))}"
        message = f"{len(torn):,} texts of the {split} rows have more than one class ({held:,} rows)"
        findings.append(Issue("conflicting-labels", message, held, example=example, hint="decide for one class each"))
    return findings


def _across(first: str, one: PlacedRows, second: str, other: PlacedRows) -> list[Issue]:
    known = {key: index for index, key in enumerate(one.folded)}
    known_exact = set(one.texts)
    leaked = [index for index, key in enumerate(other.folded) if key in known]
    if not leaked:
        return []
    exact = sum(1 for index in leaked if other.texts[index] in known_exact)
    message = (
        f"{len(leaked):,} of {len(other.texts):,} {second} rows also stand in the {first} rows"
        f" ({exact:,} to the letter, the others but for white space or case)"
    )
    example = f"{one.where(known[other.folded[leaked[0]]])} and {other.show(leaked[0])}"
    hint = f"remove them from one side; metrics on the {second} rows are too good"
    return [Issue("leakage", message, len(leaked), example=example, hint=hint, grave=True)]


def check_truncation(
    truncated: Sequence[int], max_length: int, max_truncated: float, split: str = "train"
) -> tuple[Issue, ...]:
    """Report the rows and tokens lost to the length limit.

    Args:
        truncated: For each row, the number of tokens that did not fit into ``max_length``.
        max_length: The limit in tokens.
        max_truncated: Largest share of rows that may lose tokens (`data.max_truncated`), 0 to 1.
        split: Name of the split, for messages.

    Raises:
        DataError: More rows than that lose tokens.
    """
    return check_cut(sum(map(bool, truncated)), sum(truncated), len(truncated), max_length, max_truncated, split)


def check_cut(
    cut: int, tokens: int, rows: int, max_length: int, max_truncated: float, split: str = "train"
) -> tuple[Issue, ...]:
    """Report truncation from counts, as `check_truncation` does.

    Args:
        cut: Number of rows that lose tokens.
        tokens: Tokens lost in all.
        rows: Number of rows of the split.
        max_length: As for `check_truncation`.
        max_truncated: As for `check_truncation`.
        split: As for `check_truncation`.

    Raises:
        DataError: More rows than `max_truncated` allows lose tokens.
    """
    if not cut:
        return ()
    share = cut / rows
    message = (
        f"{cut:,} of {rows:,} {split} rows ({share:.0%}) are longer than {max_length} tokens and lose"
        f" {tokens / cut:,.0f} tokens each on average"
    )
    if share > max_truncated:
        raise DataError(
            message,
            where=f"data.max_truncated allows {max_truncated:.0%} of the rows",
            hint="raise `data.max_length` as far as the model allows, shorten the texts, or raise `data.max_truncated`",
        )
    return (Issue("truncated", message, cut, hint="raise `data.max_length` if the ends of the texts matter"),)


def _classes(names: Sequence[str]) -> str:
    return f"the class {names[0]!r}" if len(names) == 1 else f"{len(names)} classes ({listed(names)})"


def listed(names: Sequence[str], shown: int = 20) -> str:
    """Return names for a message, the first ones if there are many."""
    return ", ".join(names[:shown]) + (f", and {len(names) - shown:,} more" if len(names) > shown else "")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else flat[:77] + "...")
