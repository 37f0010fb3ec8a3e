"""The first batch as the model sees it: green is learnt, grey is padding; in a pipe «learnt» stands in marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from graftwerk.sanitize import printable

ROWS = 3
"""Rows of the batch that are shown."""
TOKENS = 48
"""Tokens of a row that are shown at most, the last ones among them: the end is where the answer stands."""


def show_batch(batch: dict[str, Any], stream: TextIO) -> None:
    """Write the first batch of `training.data_checks.first_batch`, in colour on a terminal, else with marks."""
    rows, width = batch["shape"]
    colour = stream.isatty()
    legend = "\x1b[32mlearnt\x1b[0m, \x1b[2mpadding\x1b[0m" if colour else "«learnt», padding as ·"
    print(f"\nfirst batch as the model sees it ({rows} rows of {width} tokens; {legend}):", file=stream)
    for number, row in enumerate(batch["rows"][:ROWS], start=1):
        print(f"  {number}. {_row(row, colour)}", file=stream)
    if rows > ROWS:
        print(f"  and {rows - ROWS} more", file=stream)


def _row(row: dict[str, Any], colour: bool) -> str:
    said = _tokens(row["tokens"], row["trained"], colour)
    if row["padding"]:
        said += f" \x1b[2m·×{row['padding']}\x1b[0m" if colour else f" ·×{row['padding']}"
    if row["answer"] is not None:
        said += "\n     -> " + _tokens(row["answer"], [True] * len(row["answer"]), colour)
    if row["label"] is not None:
        label = printable(row["label"])
        said += f"\n     -> \x1b[32m{label}\x1b[0m" if colour else f"\n     -> «{label}»"
    return said


def _tokens(tokens: Sequence[str], trained: Sequence[bool], colour: bool) -> str:
    """Return runs of tokens that are trained, and of those that are not."""
    shown = list(zip(map(printable, tokens), trained, strict=True))
    left_out = len(shown) - TOKENS
    if left_out > 0:
        half = TOKENS // 2
        shown = [*shown[:half], (f"[{left_out} more]", False), *shown[-half:]]
    runs: list[tuple[list[str], bool]] = []
    for token, learnt in shown:
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    opened, closed = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    return " ".join(f"{opened}{' '.join(run)}{closed}" if learnt else " ".join(run) for run, learnt in runs)
