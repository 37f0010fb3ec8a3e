"""Summary of the rows of a run: how many of each label, how long, how many cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from graftwerk.tasks.base import Example, Splits, Task
from graftwerk.training.setup import Prepared
from graftwerk.training.stream import EncodedStream


def summary_of(prepared: Prepared) -> dict[str, Any]:
    """Return ``labels`` (rows by label and split), ``lengths`` in tokens and ``truncated`` rows, by split."""
    encoded = {name: examples for name, examples in prepared.examples.items() if examples}
    return {
        "labels": _labels(prepared.splits, prepared.task),
        "lengths": {name: _lengths(examples) for name, examples in encoded.items()},
        "truncated": {name: _truncated(rows) for name, rows in encoded.items()},
    }


def _labels(splits: Splits, task: Task) -> dict[str, dict[str, int]]:
    """Return the number of rows of each label in each split, in the order of the label ids."""
    if splits.labels is None:
        return {}
    counted = {
        name: Counter(label for row in rows for label in task.labels_in(row))
        for name, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
        if rows
    }
    if not any(counted.values()):  # numbers have a name, and no kinds to be counted
        return {}
    return {label: {name: counts[label] for name, counts in counted.items()} for label in splits.labels}


def _truncated(examples: Sequence[Example]) -> int:
    return examples.cut if isinstance(examples, EncodedStream) else sum(bool(it.truncated) for it in examples)


def _lengths(examples: Sequence[Example]) -> dict[str, int]:
    if isinstance(examples, EncodedStream):
        return _lengths_counted(examples.lengths_counted)
    lengths = [example.length + example.truncated for example in examples]
    median, most, longest = np.percentile(lengths, [50, 95, 100]).round().astype(int).tolist()
    return {"median": median, "p95": most, "longest": longest, "tokens": sum(lengths)}


def _lengths_counted(counts: Counter[int]) -> dict[str, int]:
    lengths = sorted(counts)
    upto = np.cumsum([counts[length] for length in lengths])
    median, most = (lengths[int(np.searchsorted(upto, share * upto[-1]))] for share in (0.5, 0.95))
    tokens = sum(length * count for length, count in counts.items())
    return {"median": median, "p95": most, "longest": lengths[-1], "tokens": tokens}
