"""`Comparison`: the result of a comparison or an ablation on disk, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, IntegrityError
from graftwerk.experiments.header import FORMAT
from graftwerk.experiments.table import as_text, rich_table
from graftwerk.own_files import refuse_links
from graftwerk.serialization.untrusted_files import read_sealed, understood

COMPARISON = "comparison.json"
COMPARISON_SCALE = 16
"""Times the size of other JSON files that it may have: it holds each pair of methods."""


class Comparison:
    """A comparison on disk.

    Attributes:
        folder: Its folder, with a run folder for each method and seed.
        result: Contents of `comparison.json`.
        report: Path of `report.html`, or None if no report was requested.

    Raises:
        ConfigError: There is no comparison in that folder.
        IntegrityError: `comparison.json` is damaged, or has another format version.
    """

    def __init__(self, folder: str | Path, *, report: Path | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / COMPARISON).is_file():
            raise ConfigError(f"{folder} holds no comparison: it has no {COMPARISON}")
        refuse_links(self.folder, (COMPARISON,))
        self.result = read_sealed(self.folder / COMPARISON, scale=COMPARISON_SCALE)
        if self.result.get("format") != FORMAT:
            raise IntegrityError(f"{COMPARISON} has another format than {FORMAT}", where=str(self.folder))
        self.report = report

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `graftwerk compare --json` prints."""
        return {"comparison": str(self.folder), "report": str(self.report) if self.report else None, **self.result}

    def table(self) -> str:
        """Return the result as plain text: one row per method, and notes below."""
        with understood(self.folder / COMPARISON):
            return as_text(self.result)

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        with understood(self.folder / COMPARISON):
            return rich_table(self.result)

    def __repr__(self) -> str:
        return f"<Comparison {self.folder}: {len(self.result['methods'])} methods, {len(self.result['seeds'])} seeds>"
