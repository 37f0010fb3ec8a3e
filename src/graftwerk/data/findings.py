"""Issues that checks of the data report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Issue:
    """Something about the data that the user should know: counted, with one example, and what to change.

    Attributes:
        code: A fixed word for programs (`rows-skipped`, `duplicates`, `leakage`, ...).
        rows: How many rows it is about.
        grave: True if the finding is severe: the metrics of this run would mislead.
        fatal: Nothing could be trained or chosen: `data.allow` does not let it pass.
    """

    code: str
    message: str
    rows: int
    example: str | None = None
    hint: str | None = None
    grave: bool = False
    fatal: bool = False
